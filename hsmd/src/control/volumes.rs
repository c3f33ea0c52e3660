//! The volumes, as the daemon sees them.

use super::Core;
use super::model::{PoolVolume, Status};

/// All volumes of all pools, in the order of the configuration.
pub(super) fn list(core: &dyn Core) -> Vec<PoolVolume> {
    of_status(&core.status())
}

/// The volumes in a status.
pub fn of_status(status: &Status) -> Vec<PoolVolume> {
    let of_pool = status.pools.iter().flat_map(|pool| {
        pool.volumes.iter().map(|volume| PoolVolume {
            pool: pool.name.clone(),
            volume: volume.clone(),
        })
    });
    of_pool.collect()
}
