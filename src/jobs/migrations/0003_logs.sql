-- Characters of the job's logs when the event was written: lines that come while it is told make it more.
ALTER TABLE outbox ADD COLUMN logged BIGINT NOT NULL DEFAULT 0;
