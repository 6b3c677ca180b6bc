//! The examples do what they say.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

#[path = "../examples/custom_transport.rs"]
mod custom_transport;
#[path = "../examples/embed_update.rs"]
mod embed_update;
#[path = "../examples/p2p_join.rs"]
mod p2p_join;
#[path = "../examples/tensor_stream.rs"]
mod tensor_stream;

#[test]
fn an_update_is_embedded() {
    embed_update::main().unwrap();
}

#[test]
fn a_transport_is_added() {
    custom_transport::main().unwrap();
}

#[test]
fn tensors_are_streamed() {
    tensor_stream::main().unwrap();
}

#[test]
fn an_instance_joins() {
    p2p_join::main().unwrap();
}
