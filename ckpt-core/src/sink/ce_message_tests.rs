use std::path::PathBuf;

use serde_json::json;

use super::*;
use crate::sink::{TensorInRing, pickle::tests::loaded_by_python};

macro_rules! golden {
    ($name:literal) => {
        include_bytes!(concat!("../../tests/golden/pickle/", $name)).as_slice()
    };
}

fn tensor(name: &str, dtype: DType, shape: &[u64], offset: u64) -> TensorInRing {
    TensorInRing { meta: TensorMeta::new(name, dtype, shape).unwrap(), offset }
}

fn host() -> Vec<u8> {
    open(&RingExport::Host { path: PathBuf::from("/run/ckpt/r-1"), offset_bytes: 512 }, 512 << 20).unwrap()
}

fn cuda(handle: Vec<u8>) -> Result<Vec<u8>> {
    open(&RingExport::Cuda { handle, offset_bytes: 4096 }, (3 << 30) + 512)
}

fn small_bucket() -> BucketMessage {
    BucketMessage {
        bucket: 0,
        tensors: vec![
            tensor("embed", DType::BF16, &[593, 64], 0),
            tensor("s", DType::F32, &[], 10_240),
            tensor("w", DType::BF16, &[2, 3, 4, 5], 65_536),
        ],
    }
}

/// `open_cuda` and `open_ascend` come from an emitter whose pickle torch 2.11 rebuilt a tensor from on a GPU.
#[test]
fn golden_bytes() {
    assert_eq!(host(), golden!("open_host.pickle"));
    let handle: Vec<u8> = (0..64).collect();
    assert_eq!(cuda(handle.clone()).unwrap(), golden!("open_cuda.pickle"));
    // A handle that has its prefix already is left as it is.
    assert_eq!(cuda([&[1, b'c'], &handle[..]].concat()).unwrap(), golden!("open_cuda.pickle"));
    assert_eq!(cuda(vec![0; 63]).unwrap_err().kind(), ErrorKind::Internal);
    let key: Vec<u8> = (100..165).collect();
    let ascend = open(&RingExport::Ascend { key, offset_bytes: 0 }, 1 << 20).unwrap();
    assert_eq!(ascend, golden!("open_ascend.pickle"));
    assert_eq!(bucket(&small_bucket()).unwrap(), golden!("bucket.pickle"));
    assert_eq!(none(), b"\x80\x04N.");
}

#[test]
fn python_loads_every_message() {
    let Some(seen) = loaded_by_python(&[
        host(),
        cuda(vec![0xab; 64]).unwrap(),
        bucket(&small_bucket()).unwrap(),
        exception("rank 3: \u{201c}no\u{201d}\n"),
        none(),
        bucket(&BucketMessage { bucket: 0, tensors: Vec::new() }).unwrap(),
    ]) else {
        return;
    };
    let int = |i: u64| json!(["int", i.to_string()]);
    assert_eq!(
        seen[0],
        json!([
            "tuple",
            [
                ["global", "ckpt_engine.worker.rebuild_host_buffer"],
                [
                    "tuple",
                    [["str", "/run/ckpt/r-1"], int(512), int(512 << 20), int(0), int(0), int(0), int(0)]
                ]
            ]
        ])
    );
    let args = seen[1][1][1][1].as_array().unwrap();
    assert_eq!(args.len(), 15);
    assert_eq!(args[7], json!(["bytes", format!("0163{}", "ab".repeat(64))]));
    // torch refuses `None` here and an int there.
    assert_eq!((&args[11], &args[14]), (&json!(["bytes", ""]), &json!(["bool", false])));
    let dict = |name: &str, dtype: &str, shape: Vec<u64>, offset: u64| {
        let shape: Vec<_> = shape.into_iter().map(int).collect();
        json!([
            "dict",
            [
                [["str", "name"], ["str", name]],
                [["str", "dtype"], ["global", format!("torch.{dtype}")]],
                [["str", "shape"], ["tuple", shape]],
                [["str", "offset"], int(offset)]
            ]
        ])
    };
    assert_eq!(
        seen[2],
        json!([
            "list",
            [
                dict("embed", "bfloat16", vec![593, 64], 0),
                dict("s", "float32", vec![], 10_240),
                dict("w", "bfloat16", vec![2, 3, 4, 5], 65_536)
            ]
        ])
    );
    assert_eq!(seen[3], json!(["exception", "RuntimeError", [["str", "rank 3: \u{201c}no\u{201d}\n"]]]));
    assert_eq!(seen[4], json!(["none"]));
    assert_eq!(seen[5], json!(["list", []]));
}

#[test]
fn what_torch_cannot_hold_is_refused_by_name() {
    let one = |t: TensorInRing| bucket(&BucketMessage { bucket: 0, tensors: vec![t] });
    for dtype in DType::ALL {
        let shape: &[u64] = &[4, 4];
        let result = one(tensor("layers.7.mlp", *dtype, shape, 0));
        if matches!(dtype, DType::F6_E2M3 | DType::F6_E3M2) {
            let error = result.unwrap_err();
            assert_eq!(
                (error.kind(), error.get(Key::Tensor)),
                (ErrorKind::Unsupported, Some("layers.7.mlp"))
            );
        } else {
            result.unwrap();
        }
    }
    // Four-bit elements: torch's shape counts pairs.
    let packed = one(tensor("w", DType::F4, &[3, 8], 0)).unwrap();
    let plain = one(tensor("w", DType::U8, &[3, 4], 0)).unwrap();
    let as_bytes = |pickle: Vec<u8>| String::from_utf8_lossy(&pickle).replace("float4_e2m1fn_x2", "uint8");
    assert_eq!(as_bytes(packed), as_bytes(plain));
    assert_eq!(one(tensor("w", DType::F4, &[2, 3], 0)).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn a_large_bucket_stays_compact() {
    let tensors: Vec<_> = (0..10_000_u64)
        .map(|i| {
            let name = format!("model.layers.{}.mlp.experts.{}.gate_proj.weight", i / 400, i % 400);
            tensor(&name, if i % 2 == 0 { DType::F8_E4M3 } else { DType::F32 }, &[2048, 7168], i * (14 << 20))
        })
        .collect();
    let names: usize = tensors.iter().map(|t| t.meta.name.len()).sum();
    let pickle = bucket(&BucketMessage { bucket: 0, tensors }).unwrap();
    // Beside the name: four keys and the dtype at two bytes each, the shape, the offset, four opcodes.
    assert!(pickle.len() <= names + 10_000 * 35 + 200, "{} bytes", pickle.len());
}

#[test]
#[ignore = "a measurement: cargo test -p ckpt-core --release --lib ce_message -- --ignored --nocapture"]
fn time_of_all_bucket_messages_of_a_large_model() {
    let tensors: Vec<_> = (0..138_980_u64)
        .map(|i| {
            let name = format!("model.layers.{}.mlp.experts.{}.gate_proj.weight", i / 2300, i % 2300);
            tensor(&name, DType::F8_E4M3, &[2048, 7168], (i % 36) * (14 << 20))
        })
        .collect();
    let buckets: Vec<_> =
        tensors.chunks(36).map(|t| BucketMessage { bucket: 0, tensors: t.to_vec() }).collect();
    let begun = std::time::Instant::now();
    let bytes: usize = buckets.iter().map(|b| bucket(b).unwrap().len()).sum();
    println!("{} buckets, {bytes} bytes, {:?}", buckets.len(), begun.elapsed());
}
