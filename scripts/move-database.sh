#!/bin/sh
# Copies all data of Cedarpost into a new database: policies, entities, keys, and the log with its
# proofs. This is for a database whose schema cannot be migrated. First run cedarpost migrate on the
# new database, and stop all servers. The old database is only read. Needs psql and pg_dump of at
# least the version of the database servers.
#
#   scripts/move-database.sh OLD_URL NEW_URL
set -eu

usage="usage: scripts/move-database.sh OLD_URL NEW_URL"
old=${1:?$usage}
new=${2:?$usage}

in_old() { psql --dbname "$old" --no-psqlrc --quiet --tuples-only --no-align --set ON_ERROR_STOP=1 "$@"; }
in_new() { psql --dbname "$new" --no-psqlrc --quiet --tuples-only --no-align --set ON_ERROR_STOP=1 "$@"; }

written=$(in_new --command "select n + (select count(*) from audit_batches) from revision")
if [ "$written" != 0 ]; then
    echo "move-database: the new database is not empty" >&2
    exit 1
fi

# The new database needs partitions for all days from the first to the last one of the log.
days=$(in_old --field-separator ' ' --command "
    select min(day), max(day)
    from (select to_date(right(relname, 8), 'YYYYMMDD') as day
          from pg_inherits join pg_class on pg_class.oid = inhrelid
          where inhparent = 'decisions'::regclass) as days
    having count(*) > 0")
if [ -n "$days" ]; then
    in_new --output /dev/null --command "
        select create_log_partitions(day::date, least(400, '${days#* }'::date - day::date + 1))
        from generate_series('${days% *}'::date, '${days#* }'::date, '400 days') as day"
fi

# One transaction copies everything or nothing. Rows that a migration has made are replaced by those
# of the old database, and stay if it has none.
{
    echo "create temporary table made as select days from log_retention;"
    echo "truncate revision, history, log_retention;"
    pg_dump --dbname "$old" --data-only --load-via-partition-root --exclude-table goose_db_version ||
        printf '\n\\.\nthe dump failed, so this is no SQL\n'
    echo "reset search_path;"
    echo "insert into history default values on conflict do nothing;"
    echo "insert into log_retention (days) select days from made on conflict do nothing;"
} | in_new --output /dev/null --single-transaction
echo "moved"
