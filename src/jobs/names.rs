//! Names of tenants' own models. Training scripts make one before they train; here they hold no version.

use sqlx::Row;
use sqlx::any::AnyRow;

use super::{Error, Store};

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
    /// Notes a model. `false` if the tenant has one of this name.
    pub async fn add_model(&self, tenant: &str, model: &OwnModel) -> Result<bool, Error> {
        let insert = "INSERT INTO models (tenant, owner, name, visibility, description, created_at) \
             VALUES ($1, $2, $3, $4, $5, {now}) ON CONFLICT (tenant, owner, name) DO NOTHING";
        let insert = self.query(insert).bind(tenant).bind(&model.owner).bind(&model.name);
        let insert = insert.bind(&model.visibility).bind(&model.description);
        Ok(insert.execute(self.pool()).await?.rows_affected() > 0)
    }

    /// A tenant's models, in the order of creation.
    pub async fn models(&self, tenant: &str) -> Result<Vec<OwnModel>, Error> {
        let list = self.query("SELECT * FROM models WHERE tenant = $1 ORDER BY created_at, owner, name").bind(tenant);
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
