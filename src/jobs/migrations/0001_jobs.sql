-- One text for SQLite and PostgreSQL. Times are milliseconds since 1970 by the database's clock.

CREATE TABLE jobs (
    id               TEXT PRIMARY KEY,     -- in the order of creation
    tenant           TEXT NOT NULL,
    status           TEXT NOT NULL,        -- queued, running, succeeded, failed, canceled, aborted
    request          TEXT NOT NULL,        -- JSON: as accepted, seed and every default fixed
    affinity         TEXT NOT NULL,        -- which adapters; empty for none
    created_at       BIGINT NOT NULL,
    started_at       BIGINT,
    completed_at     BIGINT,
    deadline         BIGINT,
    epoch            BIGINT NOT NULL DEFAULT 0,   -- counts claims: a worker of an older one cannot write
    crashes          BIGINT NOT NULL DEFAULT 0,
    lease_until      BIGINT,
    worker           TEXT,
    stop_asked       TEXT,                 -- canceled, or deadline
    progress         TEXT,                 -- JSON
    logs             TEXT NOT NULL DEFAULT '',
    result           TEXT,                 -- JSON
    error_code       TEXT,
    error            TEXT,
    webhook          TEXT,
    webhook_events   TEXT NOT NULL DEFAULT ''
);
CREATE INDEX jobs_queue ON jobs (status, tenant, id);
CREATE INDEX jobs_of_tenant ON jobs (tenant, id);

-- When a tenant last got the worker: whoever waits longest is next.
CREATE TABLE tenants (
    tenant           TEXT PRIMARY KEY,
    last_start       BIGINT NOT NULL
);

CREATE TABLE idempotency (
    tenant           TEXT NOT NULL,
    key              TEXT NOT NULL,
    body             TEXT NOT NULL,        -- SHA-256
    job              TEXT NOT NULL,
    created_at       BIGINT NOT NULL,
    PRIMARY KEY (tenant, key)
);

-- What must still be told to webhooks. Written with the change that it tells.
CREATE TABLE outbox (
    job              TEXT NOT NULL,
    event            TEXT NOT NULL,        -- start, output, logs, completed
    attempts         BIGINT NOT NULL DEFAULT 0,
    next_at          BIGINT NOT NULL,
    PRIMARY KEY (job, event)
);
CREATE INDEX outbox_due ON outbox (next_at);
