//! Names of tenants' own models. Training scripts make one before they train; here they hold no version.

use sqlx::Row;
use sqlx::any::AnyRow;

use super::{Error, Store};

/// Models of one tenant.
const MOST: i64 = 1000;

/// A tenant's model, as it was created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnModel {
    pub owner: String,
    pub name: String,
    /// public or private; either way nobody else sees it.
    pub visibility: String,
    pub description: String,
}

impl Store {
    /// Notes a model. `false` if the tenant has one of this name; [`Error::ModelsFull`] if it has as many as it may.
    pub async fn add_model(&self, tenant: &str, new: &OwnModel) -> Result<bool, Error> {
        let insert = "INSERT INTO models (tenant, owner, name, visibility, description, created_at) \
             SELECT $1, $2, $3, $4, $5, {now} WHERE (SELECT COUNT(*) FROM models WHERE tenant = $1) < CAST($6 AS BIGINT) \
             ON CONFLICT (tenant, owner, name) DO NOTHING";
        let insert = self.query(insert).bind(tenant).bind(&new.owner).bind(&new.name);
        let insert = insert.bind(&new.visibility).bind(&new.description).bind(MOST);
        if insert.execute(self.pool()).await?.rows_affected() > 0 {
            return Ok(true);
        }
        let there = self.model(tenant, &new.owner, &new.name).await?.is_some();
        if there { Ok(false) } else { Err(Error::ModelsFull(MOST)) }
    }

    /// A tenant's model of this name.
    pub async fn model(&self, tenant: &str, owner: &str, name: &str) -> Result<Option<OwnModel>, Error> {
        let find = self.query("SELECT * FROM models WHERE tenant = $1 AND owner = $2 AND name = $3");
        find.bind(tenant).bind(owner).bind(name).fetch_optional(self.pool()).await?.as_ref().map(model).transpose()
    }

    /// A tenant's models in the order of owner and name, from behind `after`.
    pub async fn models(&self, tenant: &str, after: (&str, &str), limit: i64) -> Result<Vec<OwnModel>, Error> {
        let list = "SELECT * FROM models WHERE tenant = $1 AND (owner, name) > ($2, $3) ORDER BY owner, name LIMIT $4";
        let list = self.query(list).bind(tenant).bind(after.0).bind(after.1).bind(limit);
        list.fetch_all(self.pool()).await?.iter().map(model).collect()
    }

    /// Forgets a model. `false` if there is none.
    pub async fn remove_model(&self, tenant: &str, owner: &str, name: &str) -> Result<bool, Error> {
        let remove = self.query("DELETE FROM models WHERE tenant = $1 AND owner = $2 AND name = $3");
        Ok(remove.bind(tenant).bind(owner).bind(name).execute(self.pool()).await?.rows_affected() > 0)
    }
}

fn model(row: &AnyRow) -> Result<OwnModel, Error> {
    Ok(OwnModel {
        owner: row.try_get("owner")?,
        name: row.try_get("name")?,
        visibility: row.try_get("visibility")?,
        description: row.try_get("description")?,
    })
}
