-- What the sweeper of history has to know of past days.

-- +goose Up

-- The smallest revision that a decision of the day was made at, null if there was
-- none: history is kept from there on for as long as the day's partition is. It is
-- found once, when nobody writes to that partition any more, for that reads it all.
create table decision_days (
	day          date   primary key,
	min_revision bigint
);
