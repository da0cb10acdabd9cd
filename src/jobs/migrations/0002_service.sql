-- Keys of tenants. The secret part is stored as its SHA-256 only.
CREATE TABLE keys (
    id               TEXT PRIMARY KEY,
    tenant           TEXT NOT NULL,
    label            TEXT NOT NULL,
    admin            BIGINT NOT NULL,
    hash             TEXT NOT NULL,
    created_at       BIGINT NOT NULL,
    revoked_at       BIGINT
);

-- Files that clients sent ahead of their jobs. The bytes are in the object store.
CREATE TABLE uploads (
    id               TEXT PRIMARY KEY,     -- in the order of creation
    tenant           TEXT NOT NULL,
    name             TEXT NOT NULL,
    content_type     TEXT NOT NULL,
    size             BIGINT NOT NULL,
    sha256           TEXT NOT NULL,
    metadata         TEXT NOT NULL,        -- JSON
    created_at       BIGINT NOT NULL,
    expires_at       BIGINT NOT NULL
);
CREATE INDEX uploads_of_tenant ON uploads (tenant, id);
CREATE INDEX uploads_end ON uploads (expires_at);

-- Whoever waits for results asks for what ended lately.
CREATE INDEX jobs_ended ON jobs (completed_at);

-- Models of tenants' own: names for what is trained elsewhere.
CREATE TABLE models (
    tenant           TEXT NOT NULL,
    owner            TEXT NOT NULL,
    name             TEXT NOT NULL,
    visibility       TEXT NOT NULL,
    description      TEXT NOT NULL,
    created_at       BIGINT NOT NULL,
    PRIMARY KEY (tenant, owner, name)
);

-- The base model that a job is for: workers take those of theirs.
ALTER TABLE jobs ADD COLUMN base TEXT NOT NULL DEFAULT '';

-- 1 once pictures, input and logs were removed because they were old.
ALTER TABLE jobs ADD COLUMN data_removed BIGINT NOT NULL DEFAULT 0;
