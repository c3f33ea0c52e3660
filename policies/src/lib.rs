//! Policies: rules over the catalog. Filled by a later release.
