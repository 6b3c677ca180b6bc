//! What happens while a reader connects.

use std::time::Duration;

use ckpt_core::device::host::HostBuffer;

use crate::support::{Hosts, PIECE, assert_arrived, blank, soon};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_may_release_other_memory_while_a_reader_connects() {
    let hosts = Hosts::new(1, PIECE as usize, |_| ()).await;
    let other = HostBuffer::allocate(4096).unwrap();
    let other = hosts.owner.one_sided().unwrap().register(other).await.unwrap();
    let hca = &hosts.owner_host.hcas[0];
    hca.set("stall", 1);
    let into = blank(PIECE);
    let event = hosts.start(0, &into, soon());
    hca.wait_for("stalled", |calls| calls == 1);
    drop(other);
    // So that the owner tells of the release before it has the queue pairs; nobody can see when it has.
    tokio::time::sleep(Duration::from_millis(20)).await;
    hca.set("stall", 0);
    event.done(soon()).await.unwrap();
    assert_arrived(&into, 0);
    hosts.finish().await;
}
