//! Tests of the catalog: the fold against a naive model, hostile transactions, the file's life.

mod build;
mod file;
mod hostile;
mod model;
mod queries;
mod random;
