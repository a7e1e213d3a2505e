-- Indexes that questions about the log need.

-- +goose Up

-- `denied_at` at the end lets a rare kind of denial be found in the index, without
-- a look at each denied row.
create index decisions_denials on decisions (at desc, decision_id desc, denied_at) where not allowed;
drop index decisions_denied;

-- With the place in the log, so that the first batch of a day is found at once.
create index audit_batches_day_seq on audit_batches (day, seq);
drop index audit_batches_day;
