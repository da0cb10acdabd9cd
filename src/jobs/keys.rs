//! API keys: who a request comes from. `dk_ID_SECRET`; only the secret's hash is stored.

use aws_lc_rs::constant_time::verify_slices_are_equal;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};
use sqlx::Row;
use sqlx::any::AnyRow;

use super::{Error, JobId, Store};
use crate::hex::hex;

const PREFIX: &str = "dk";

/// Bytes of a secret.
const SECRET: usize = 32;

/// A tenant's key, without its secret. Times are in milliseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub id: String,
    pub tenant: String,
    /// What its owner calls it.
    pub label: String,
    /// May also see metrics, and see and empty the cache of LoRAs.
    pub admin: bool,
    pub created_at: i64,
    pub revoked_at: Option<i64>,
}

impl Store {
    /// A new key. The text is shown once and cannot be had again.
    pub async fn create_key(&self, tenant: &str, label: &str, admin: bool) -> Result<(Key, String), Error> {
        let mut secret = [0; SECRET];
        aws_lc_rs::rand::fill(&mut secret).map_err(|_| Error::Random)?;
        let secret = URL_SAFE_NO_PAD.encode(secret);
        let insert =
            "INSERT INTO keys (id, tenant, label, admin, hash, created_at) VALUES ($1, $2, $3, $4, $5, {now}) RETURNING *";
        let insert = self.query(insert).bind(JobId::new().to_string()).bind(tenant).bind(label);
        let insert = insert.bind(i64::from(admin)).bind(hash(&secret));
        let key = key(&insert.fetch_one(self.pool()).await?)?;
        let text = format!("{PREFIX}_{}_{secret}", key.id);
        Ok((key, text))
    }

    /// All keys, in the order of creation.
    pub async fn keys(&self) -> Result<Vec<Key>, Error> {
        self.query("SELECT * FROM keys ORDER BY id").fetch_all(self.pool()).await?.iter().map(key).collect()
    }

    /// Whether keys are asked for: one was made once, even if it was revoked.
    pub async fn has_keys(&self) -> Result<bool, Error> {
        Ok(self.query("SELECT 1 FROM keys LIMIT 1").fetch_optional(self.pool()).await?.is_some())
    }

    /// Ends a key. `None` if there is none of this name.
    pub async fn revoke_key(&self, id: &str) -> Result<Option<Key>, Error> {
        let revoke = self.query("UPDATE keys SET revoked_at = COALESCE(revoked_at, {now}) WHERE id = $1 RETURNING *").bind(id);
        revoke.fetch_optional(self.pool()).await?.as_ref().map(key).transpose()
    }

    /// The key that a client sent, if it is one and was not revoked.
    pub async fn key(&self, text: &str) -> Result<Option<Key>, Error> {
        // Nothing that cannot be a key gets near the database.
        let mut parts = text.splitn(3, '_');
        let (Some(PREFIX), Some(id), Some(secret)) = (parts.next(), parts.next(), parts.next()) else { return Ok(None) };
        if id.parse::<JobId>().is_err() || secret.len() != SECRET.div_ceil(3) * 4 - 1 {
            return Ok(None);
        }
        let find = self.query("SELECT * FROM keys WHERE id = $1 AND revoked_at IS NULL").bind(id);
        let Some(row) = find.fetch_optional(self.pool()).await? else { return Ok(None) };
        let stored: String = row.try_get("hash")?;
        let equal = verify_slices_are_equal(stored.as_bytes(), hash(secret).as_bytes()).is_ok();
        if equal { Ok(Some(key(&row)?)) } else { Ok(None) }
    }
}

/// A plain hash is enough for 256 random bits.
fn hash(secret: &str) -> String {
    hex(&Sha256::digest(secret))
}

fn key(row: &AnyRow) -> Result<Key, Error> {
    Ok(Key {
        id: row.try_get("id")?,
        tenant: row.try_get("tenant")?,
        label: row.try_get("label")?,
        admin: row.try_get::<i64, _>("admin")? != 0,
        created_at: row.try_get("created_at")?,
        revoked_at: row.try_get("revoked_at")?,
    })
}
