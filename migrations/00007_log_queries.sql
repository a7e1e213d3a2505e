-- Indexes that questions about the log need.

-- +goose Up

-- `denied_at` at the end lets a rare kind of denial be found in the index, and with
-- what is included denials are counted by outcome and by principal there, without a
-- look at each denied row. Actions are in an index of their own: with the longest
-- names of both, the row of one would be too large, and the decision refused.
create index decisions_denials on decisions (at desc, decision_id desc, denied_at)
	include (allowed, principal_type, principal_id) where not allowed;
create index decisions_denied_actions on decisions (at desc)
	include (allowed, denied_at, action_type, action_id) where not allowed;
drop index decisions_denied;

-- With the place in the log, so that the first batch of a day is found at once.
create index audit_batches_day_seq on audit_batches (day, seq);
drop index audit_batches_day;
