//! The transport `cuda`.

mod transport;

pub use transport::{CudaTransport, CudaTransportProvider};
