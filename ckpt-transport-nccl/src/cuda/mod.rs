//! The transport `cuda`: copies over CUDA IPC inside hosts, NCCL between them.
//!
//! Whether one GPU can reach another shows only when it is tried, and all members must come to the same answer. So when a
//! group forms, its members meet, say where they are, try, and tell each other how it went. On one host copies do
//! everything. On several hosts with as many members each, the k-th members of all hosts are a *rail*, an NCCL group: a
//! broadcast runs along its root's rail, and from there on by copies. Elsewhere NCCL does everything.

mod layout;
mod meeting;
mod rails;
#[cfg(test)]
mod tests;
mod transport;

pub use transport::{CudaTransport, CudaTransportProvider};
