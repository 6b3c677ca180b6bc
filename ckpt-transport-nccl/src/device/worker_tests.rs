//! The worker on the fake driver, against the real parameter server's side of the link.

use std::{collections::HashMap, sync::Arc};

use ckpt_core::{
    DType, ErrorKind, Result,
    device::{BufferSlice, DeviceBackend, Ring, Stream as _},
    sink::{BucketMessage, Layout, NativeSink, NativeSinkConfig, TensorInRing, WeightSink},
    types::TensorMeta,
    worker::{NativeWorker, UpdateSummary},
};

use super::{
    CudaDevice, PieceCopier,
    tests::{pinned, soon},
    worker::{CudaMapper, DeviceParameters},
};
use crate::fake;

fn meta(name: &str, len: u64) -> TensorMeta {
    TensorMeta { name: name.into(), dtype: DType::U8, shape: vec![len].into() }
}

/// Tensors at multiples of 256 with bytes made of their number and `version`.
fn checkpoint(version: u8) -> (Vec<TensorInRing>, Vec<u8>) {
    let lengths = [1u64, 0, 255, 4097, 256, 70_000];
    let mut bytes = Vec::new();
    let tensors = lengths.iter().enumerate().map(|(i, len)| {
        let offset = bytes.len() as u64;
        bytes.resize((offset + len) as usize, i as u8 * 10 + version);
        bytes.resize(bytes.len().next_multiple_of(256), 0);
        TensorInRing { meta: meta(&format!("layer.{i}"), *len), offset }
    });
    let tensors = tensors.collect();
    (tensors, bytes)
}

async fn fill(device: &CudaDevice, ring: &dyn Ring, bytes: &[u8]) {
    let stream = device.stream("h2d").unwrap();
    let target = BufferSlice::new(ring.buffer(), 0..bytes.len() as u64).unwrap();
    stream.copy(BufferSlice::whole(pinned(device, bytes)), target).unwrap();
    stream.record().unwrap().done(soon()).await.unwrap();
}

struct Pair {
    server: CudaDevice,
    folder: tempfile::TempDir,
    worker: NativeWorker,
    parameters: DeviceParameters,
}

impl Pair {
    fn new() -> Self {
        use std::os::unix::fs::PermissionsExt;
        let device = Arc::new(fake::device(0));
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let worker =
            NativeWorker::new(device.info().uuid.clone()).with_mapper(CudaMapper::new(device.clone()));
        let parameters = DeviceParameters::allocating(device).unwrap();
        Self { server: fake::device(0), folder, worker, parameters }
    }

    /// One update; what the parameter server and the worker say.
    async fn update(
        &mut self,
        ring: &dyn Ring,
        tensors: &[TensorInRing],
        config: NativeSinkConfig,
    ) -> (Result<()>, Result<UpdateSummary>) {
        self.update_in(4, ring, tensors, config).await
    }

    /// The same with so many tensors a bucket.
    async fn update_in(
        &mut self,
        chunk: usize,
        ring: &dyn Ring,
        tensors: &[TensorInRing],
        config: NativeSinkConfig,
    ) -> (Result<()>, Result<UpdateSummary>) {
        let mut sink = NativeSink::bind(self.folder.path(), &self.server.info().uuid, config).unwrap();
        let endpoint = sink.endpoint().to_owned();
        let (worker, parameters) = (&mut self.worker, &mut self.parameters);
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || worker.update(&endpoint, parameters, soon()));
            let handle = tokio::runtime::Handle::current();
            let served = tokio::task::block_in_place(|| {
                handle.block_on(async {
                    let served: Result<()> = async {
                        sink.open(ring, soon()).await?;
                        for (i, tensors) in tensors.chunks(chunk).enumerate() {
                            sink.deliver(
                                &BucketMessage { bucket: i as u32, tensors: tensors.to_vec() },
                                soon(),
                            )
                            .await?;
                        }
                        sink.release(soon()).await?;
                        sink.finish(soon()).await
                    }
                    .await;
                    if let Err(error) = &served {
                        sink.fail(error, soon()).await.unwrap();
                    }
                    served
                })
            });
            (served, thread.join().unwrap())
        })
    }

    fn held(&mut self, name: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.parameters
            .read(name, |piece| {
                bytes.extend_from_slice(piece);
                Ok(())
            })
            .unwrap();
        bytes
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_takes_updates_into_its_own_memory_and_keeps_the_mapping() {
    let mut pair = Pair::new();
    let ring = pair.server.allocate_ring(1 << 20).unwrap();
    for version in [1, 2] {
        let (tensors, bytes) = checkpoint(version);
        fill(&pair.server, &*ring, &bytes).await;
        let layout = Layout::new(tensors.iter().map(|t| t.meta.clone()).collect::<Vec<_>>()).unwrap();
        let digests: HashMap<Arc<str>, u64> = tensors
            .iter()
            .map(|t| {
                let range = t.offset as usize..(t.offset + t.meta.len_bytes()) as usize;
                (t.meta.name.clone(), twox_hash::XxHash3_64::oneshot(&bytes[range]))
            })
            .collect();
        let config = NativeSinkConfig {
            kept_ring: Some(1),
            layout: Some(Arc::new(layout)),
            digests: Some(Arc::new(digests)),
        };
        let (served, taken) = pair.update(&*ring, &tensors, config).await;
        served.unwrap();
        let summary = taken.unwrap();
        assert_eq!((summary.buckets, summary.tensors, summary.mapping_kept), (2, 6, version == 2));
        for tensor in &tensors {
            let range = tensor.offset as usize..(tensor.offset + tensor.meta.len_bytes()) as usize;
            assert_eq!(pair.held(&tensor.meta.name), bytes[range], "{}", tensor.meta.name);
        }
    }
    assert_eq!(pair.parameters.names().count(), 6);
    assert_eq!(fake::stack_depth(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_digest_and_a_wrong_size_reach_both_sides_with_the_tensors_name() {
    let mut pair = Pair::new();
    let ring = pair.server.allocate_ring(1 << 20).unwrap();
    let (mut tensors, bytes) = checkpoint(1);
    fill(&pair.server, &*ring, &bytes).await;
    let digests = HashMap::from([(tensors[2].meta.name.clone(), 7u64)]);
    let config = NativeSinkConfig { digests: Some(Arc::new(digests)), ..NativeSinkConfig::default() };
    let (served, taken) = pair.update(&*ring, &tensors, config).await;
    assert_eq!(taken.unwrap_err().kind(), ErrorKind::Corrupt);
    let served = served.unwrap_err().to_string();
    assert!(served.contains("layer.2") && served.contains("digest"), "{served}");
    // The memory of the first update has the first size.
    tensors[2].meta = meta("layer.2", 200);
    let (served, taken) = pair.update(&*ring, &tensors, NativeSinkConfig::default()).await;
    assert!(taken.unwrap_err().to_string().contains("255 bytes and its new weights 200"));
    assert!(served.unwrap_err().to_string().contains("layer.2"));
    // And the worker is as good as new.
    let (tensors, _) = checkpoint(1);
    let (served, taken) = pair.update(&*ring, &tensors, NativeSinkConfig::default()).await;
    served.unwrap();
    taken.unwrap();
    assert_eq!(pair.held("layer.5"), vec![51; 70_000]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engines_own_parameters_are_written_and_strangers_are_refused() {
    let mut pair = Pair::new();
    let device = Arc::new(fake::device(0));
    let ring = pair.server.allocate_ring(1 << 20).unwrap();
    let (tensors, bytes) = checkpoint(3);
    fill(&pair.server, &*ring, &bytes).await;
    pair.parameters = DeviceParameters::new(device.clone()).unwrap();
    let own = device.allocate(4097).unwrap();
    let own = BufferSlice::new(own, 0..4097).unwrap();
    pair.parameters.insert("layer.3", own.clone()).unwrap();
    let (served, _) = pair.update(&*ring, &tensors[3..4], NativeSinkConfig::default()).await;
    served.unwrap();
    assert_eq!(pair.held("layer.3"), vec![33; 4097]);
    let (served, taken) = pair.update(&*ring, &tensors, NativeSinkConfig::default()).await;
    assert!(served.unwrap_err().to_string().contains("no parameter has this name"));
    assert_eq!(taken.unwrap_err().kind(), ErrorKind::ConfigInvalid);
    let host = BufferSlice::whole(pinned(&device, &[0; 8]));
    assert_eq!(pair.parameters.insert("x", host).unwrap_err().kind(), ErrorKind::ConfigInvalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_small_tensors_go_by_one_kernel_whatever_their_lengths() {
    let device = Arc::new(fake::device(0));
    let stream = device.cuda_stream("copy out").unwrap();
    let mut copier = PieceCopier::load(device.clone()).unwrap();
    // Twice: the list's memory is used again. Some need several pieces, some none.
    for round in 0..2u8 {
        let lengths = (0..200u64).map(|i| if i == 150 { 200_001 } else { i * 31 % 700 });
        let mut pairs = Vec::new();
        let mut expected = Vec::new();
        for (i, len) in lengths.enumerate() {
            let bytes = vec![i as u8 ^ round; len as usize];
            let from = BufferSlice::new(device.allocate(len + 3).unwrap(), 3..len + 3).unwrap();
            let to = BufferSlice::new(device.allocate(len + 5).unwrap(), 5..len + 5).unwrap();
            stream.copy(BufferSlice::whole(pinned(&device, &bytes)), from.clone()).unwrap();
            expected.push(bytes);
            pairs.push((from, to));
        }
        copier.copy(&stream, &pairs, soon()).unwrap();
        for ((_, to), expected) in pairs.iter().zip(&expected) {
            // SAFETY: the fake's device memory is host memory, and the copies are done.
            let held = unsafe { std::slice::from_raw_parts(to.address() as *const u8, expected.len()) };
            assert_eq!(held, expected);
        }
    }
    let uneven = BufferSlice::new(device.allocate(8).unwrap(), 0..4).unwrap();
    let whole = BufferSlice::new(device.allocate(8).unwrap(), 0..8).unwrap();
    assert_eq!(copier.copy(&stream, &[(uneven, whole)], soon()).unwrap_err().kind(), ErrorKind::Internal);

    let mut pair = Pair::new();
    let ring = pair.server.allocate_ring(1 << 20).unwrap();
    let mut bytes = Vec::new();
    let tensors: Vec<TensorInRing> = (0..300u64)
        .map(|i| {
            let offset = bytes.len() as u64;
            bytes.resize((offset + 1 + i) as usize, i as u8);
            bytes.resize(bytes.len().next_multiple_of(256), 0);
            TensorInRing { meta: meta(&format!("layer.{i}"), 1 + i), offset }
        })
        .collect();
    fill(&pair.server, &*ring, &bytes).await;
    let (served, taken) = pair.update_in(300, &*ring, &tensors, NativeSinkConfig::default()).await;
    served.unwrap();
    assert_eq!(taken.unwrap().buckets, 1);
    for i in [0, 1, 77, 299] {
        assert_eq!(pair.held(&format!("layer.{i}")), vec![i as u8; i + 1]);
    }
}

/// The layout's parameters are looked up once: an engine that moves one must not find its old place written.
#[tokio::test(flavor = "multi_thread")]
async fn a_parameter_that_moved_between_updates_is_written_where_it_is() {
    let mut pair = Pair::new();
    let ring = pair.server.allocate_ring(1 << 20).unwrap();
    let layout =
        Arc::new(Layout::new(checkpoint(1).0.iter().map(|t| t.meta.clone()).collect::<Vec<_>>()).unwrap());
    let mut old = None;
    for version in [1, 2] {
        let (tensors, bytes) = checkpoint(version);
        fill(&pair.server, &*ring, &bytes).await;
        let config = NativeSinkConfig { layout: Some(layout.clone()), ..NativeSinkConfig::default() };
        let (served, taken) = pair.update(&*ring, &tensors, config).await;
        served.unwrap();
        taken.unwrap();
        assert!(pair.held("layer.3") == [30 + version; 4097], "update {version}");
        if version == 1 {
            old = pair.parameters.find("layer.3").cloned();
            let moved = BufferSlice::new(fake::device(0).allocate(4097).unwrap(), 0..4097).unwrap();
            pair.parameters.insert("layer.3", moved).unwrap();
        }
    }
    pair.parameters.insert("old", old.unwrap()).unwrap();
    assert!(pair.held("old") == [31; 4097], "the second update wrote the old place");
}
