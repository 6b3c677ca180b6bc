//! The ckpt command line as a library.
