//! Metas as JSON against checkpoint-engine's own data classes.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::{
    collections::BTreeMap,
    io::Write,
    process::{Command, Stdio},
    sync::Arc,
};

use bytes::Bytes;
use ckpt_core::{
    DType, Version,
    checkpoint::Digests,
    manifest::{Arena, Share, Tensor},
    metas::{Extension, Metas, Placement, RankMetas},
    types::{TensorMeta, align_up},
};

/// Loads the peer's data classes alone: its package imports GPU libraries. Where torch is not installed, a stand-in has
/// the three names that the classes use; parsing and printing is all pydantic's and the peer's own code.
const SCRIPT: &str = r#"
import importlib.util, sys, types
try:
    import torch
    kind = "torch"
except ImportError:
    torch = types.ModuleType("torch")
    class dtype:
        def __init__(self, name): self.name = name
        def __repr__(self): return "torch." + self.name
    class Size(tuple): pass
    class Tensor: pass
    torch.dtype, torch.Size, torch.Tensor = dtype, Size, Tensor
    for name in sys.argv[1].split(","): setattr(torch, name, dtype(name))
    sys.modules["torch"] = torch
    kind = "stand-in"
folder = importlib.util.find_spec("checkpoint_engine").submodule_search_locations[0]
spec = importlib.util.spec_from_file_location("data_types", folder + "/data_types.py")
peer = importlib.util.module_from_spec(spec)
sys.modules["data_types"] = peer
spec.loader.exec_module(peer)
from pydantic import TypeAdapter
metas = TypeAdapter(dict[int, peer.MemoryBufferMetaList])
parsed = metas.validate_json(sys.stdin.read())
for rank in parsed.values():
    for buffer in rank.memory_buffer_metas_list:
        assert sum(m.aligned_size for m in buffer.metas) == buffer.size
        for m in buffer.metas:
            assert isinstance(m, peer.ParameterMeta) and isinstance(m.dtype, torch.dtype), m
            assert isinstance(m.shape, torch.Size), m
            if kind == "torch":  # the peer's own rule for the size of a tensor in memory
                assert (m.dtype.itemsize * m.shape.numel() + 255) // 256 * 256 == m.aligned_size, m
print(kind, file=sys.stderr)
print(metas.dump_json(parsed).decode())
"#;

fn ours() -> Metas {
    // torch has no 6-bit floats, so the peer cannot know them.
    let dtypes = DType::ALL.iter().filter(|d| ![DType::F6_E2M3, DType::F6_E3M2].contains(d));
    let mut arena = Arena::default();
    let mut place = |name: String, dtype: DType, shape: &[u64]| {
        let meta = TensorMeta::new(name, dtype, shape).unwrap();
        let offset = arena.len_bytes;
        arena.len_bytes += align_up(meta.len_bytes());
        arena.tensors.push(Tensor { meta, offset });
    };
    dtypes.for_each(|dtype| place(format!("model.{}.é", dtype.safetensors_name()), *dtype, &[300, 4]));
    place("scalar".into(), DType::F32, &[]);
    place("empty".into(), DType::BF16, &[0, 7]);
    let count = arena.tensors.len();
    let share = Arc::new(Share { arenas: vec![arena] });
    let extension = Extension {
        host: "node-1".into(),
        version: Version(7),
        generation: 1,
        digests: Some(Digests { values: (0..count as u64).collect(), ..Digests::default() }),
        descriptors: BTreeMap::from([("tcp".to_owned(), Bytes::from_static(b"\x00\xff"))]),
    };
    let rank = |address: Option<&str>, device: &str, extension| {
        let placement = Placement {
            p2p_store_addr: address.map(str::to_owned),
            rdma_device: device.into(),
            arena_addresses: vec![0x7f00_0000_0000],
            extension,
        };
        RankMetas::new(share.clone(), placement).unwrap()
    };
    let ranks = BTreeMap::from([
        (0, rank(Some("10.0.0.1:15428"), "mlx5_0,mlx5_1", Some(extension))),
        (255, rank(None, "", None)),
    ]);
    Metas { ranks }
}

#[test]
#[ignore = "needs the peer's package: pip install --no-deps checkpoint-engine==0.4.2; pip install pydantic; then \
            CKPT_TEST_PYTHON=<python> cargo test -p integration-tests --test metas_python -- --ignored"]
fn the_peers_classes_parse_our_metas_and_we_parse_theirs() {
    let metas = ours();
    let names: Vec<&str> = DType::ALL.iter().map(|d| d.torch_name()).collect();
    let python = std::env::var_os("CKPT_TEST_PYTHON").unwrap_or("python3".into());
    let mut child = Command::new(python)
        .args(["-c", SCRIPT, &names.join(",")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The script reads all of it before it writes, so neither side blocks on a full pipe.
    child.stdin.take().unwrap().write_all(metas.to_json().unwrap().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    eprintln!("parsed with {}", errors.trim());
    let theirs = Metas::from_json(&output.stdout).unwrap();
    // They drop our key and keep the rest.
    let mut expected = metas;
    expected.ranks.values_mut().for_each(|m| m.placement.extension = None);
    assert_eq!(theirs, expected);
}
