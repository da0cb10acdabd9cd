//! Files that clients send ahead of their jobs. Here is what is known of them; the bytes are in the object store.

use serde_json::Value;
use sqlx::any::AnyRow;
use sqlx::{Executor, Row};

use super::{Error, JobId, Store};

/// A file to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewUpload {
    pub tenant: String,
    pub name: String,
    pub content_type: String,
    /// In bytes.
    pub size: i64,
    pub sha256: String,
    pub metadata: Value,
    /// Milliseconds for which it is kept.
    pub lives: i64,
}

/// A stored file. Times are in milliseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upload {
    pub id: JobId,
    pub tenant: String,
    pub name: String,
    pub content_type: String,
    pub size: i64,
    pub sha256: String,
    pub metadata: Value,
    pub created_at: i64,
    pub expires_at: i64,
}

impl Store {
    /// Notes a file under `id`, before its bytes are stored: what is not noted is never removed. [`Error::FilesFull`] if its tenant has
    /// no room for it.
    pub async fn add_upload(&self, id: &JobId, new: &NewUpload) -> Result<Upload, Error> {
        // Files whose time is over count until they are removed.
        let insert = "INSERT INTO uploads (id, tenant, name, content_type, size, sha256, metadata, created_at, expires_at) \
             SELECT $1, $2, $3, $4, CAST($5 AS BIGINT), $6, $7, clock.now, clock.now + CAST($8 AS BIGINT) FROM (SELECT {now} AS now) AS clock \
             WHERE (SELECT COALESCE(SUM(size), 0) FROM uploads WHERE tenant = $2) + CAST($5 AS BIGINT) <= CAST($9 AS BIGINT) \
             RETURNING *";
        let mut transaction = self.begin().await?;
        if !self.is_file() {
            // Two that are added at the same time would not see each other.
            transaction.execute("LOCK TABLE uploads IN SHARE ROW EXCLUSIVE MODE").await?;
        }
        let insert = self.query(insert).bind(id.as_str()).bind(&new.tenant).bind(&new.name).bind(&new.content_type);
        let insert = insert.bind(new.size).bind(&new.sha256).bind(new.metadata.to_string()).bind(new.lives);
        let added = insert.bind(self.limits.files_of_tenant).fetch_optional(&mut *transaction).await?;
        let added = upload(&added.ok_or(Error::FilesFull(self.limits.files_of_tenant))?)?;
        transaction.commit().await?;
        Ok(added)
    }

    /// A tenant's file, while it lives. What belongs to another is not there.
    pub async fn upload(&self, tenant: &str, id: &JobId) -> Result<Option<Upload>, Error> {
        let find = "SELECT * FROM uploads WHERE id = $1 AND tenant = $2 AND expires_at > {now}";
        let find = self.query(find).bind(id.as_str()).bind(tenant);
        find.fetch_optional(self.pool()).await?.as_ref().map(upload).transpose()
    }

    /// A tenant's files, newest first, from below `before`.
    pub async fn uploads(&self, tenant: &str, before: Option<&JobId>, limit: i64) -> Result<Vec<Upload>, Error> {
        let list = "SELECT * FROM uploads WHERE tenant = $1 AND id < $2 AND expires_at > {now} ORDER BY id DESC LIMIT $3";
        let list = self.query(list).bind(tenant).bind(before.map_or("~", JobId::as_str)).bind(limit);
        list.fetch_all(self.pool()).await?.iter().map(upload).collect()
    }

    /// Forgets a tenant's file. `false` if there is none.
    pub async fn remove_upload(&self, tenant: &str, id: &JobId) -> Result<bool, Error> {
        let remove = self.query("DELETE FROM uploads WHERE id = $1 AND tenant = $2").bind(id.as_str()).bind(tenant);
        Ok(remove.execute(self.pool()).await?.rows_affected() > 0)
    }

    /// The files whose time is over: at most 100, drawn by lot as [`Self::old`] are.
    pub async fn expired_uploads(&self) -> Result<Vec<JobId>, Error> {
        let expired = self
            .query("SELECT id FROM uploads WHERE expires_at <= {now} ORDER BY RANDOM() LIMIT 100")
            .fetch_all(self.pool())
            .await?;
        expired.iter().map(id).collect()
    }

    /// After its file.
    pub async fn forget_upload(&self, id: &JobId) -> Result<(), Error> {
        self.query("DELETE FROM uploads WHERE id = $1").bind(id.as_str()).execute(self.pool()).await?;
        Ok(())
    }
}

fn id(row: &AnyRow) -> Result<JobId, Error> {
    row.try_get::<String, _>("id")?.parse().map_err(|()| Error::Damaged("uploads"))
}

fn upload(row: &AnyRow) -> Result<Upload, Error> {
    Ok(Upload {
        id: id(row)?,
        tenant: row.try_get("tenant")?,
        name: row.try_get("name")?,
        content_type: row.try_get("content_type")?,
        size: row.try_get("size")?,
        sha256: row.try_get("sha256")?,
        metadata: serde_json::from_str(&row.try_get::<String, _>("metadata")?).map_err(|_| Error::Damaged("uploads"))?,
        created_at: row.try_get("created_at")?,
        expires_at: row.try_get("expires_at")?,
    })
}
