//! What checkpoint-engine's worker is sent, as pickles.

use super::{
    BucketMessage,
    pickle::{Memo, Pickler, ShortTuple},
};
use crate::{
    device::RingExport,
    error::{Error, ErrorKind, Key, Result},
    types::{DType, TensorMeta, format_shape},
};

/// Version and kind of a shareable handle. Every torch reads version 1; `c` is a `cuMemAlloc` (`aclrtMalloc`) block.
const HANDLE_PREFIX: [u8; 2] = [1, b'c'];
const CUDA_HANDLE_LEN: usize = 64;
const ASCEND_KEY_LEN: usize = 65;

/// Message 1: `(func, args)`, which rebuilds the ring in the worker.
pub(super) fn open(export: &RingExport, ring_bytes: u64) -> Result<Vec<u8>> {
    match export {
        RingExport::Host { path, offset_bytes } => {
            let path = path.to_str().ok_or_else(|| {
                Error::new(
                    ErrorKind::Unsupported,
                    "open the ring",
                    "the ring's path is not UTF-8; set CKPT_RUNTIME_DIR to a plain path",
                )
                .with(Key::Path, path.display())
            })?;
            let mut p = Pickler::new(256);
            p.global("ckpt_engine.worker", "rebuild_host_buffer");
            p.begin();
            p.str(path);
            p.int(*offset_bytes);
            p.int(ring_bytes);
            // Places 3 to 5 are unused; the worker puts its device index into place 6, as for a device tensor.
            for _ in 3..=6 {
                p.int(0);
            }
            p.end_tuple();
            p.short_tuple(ShortTuple::Two);
            Ok(p.finish())
        }
        RingExport::Cuda { handle, offset_bytes } => {
            let function = ("torch.multiprocessing.reductions", "rebuild_cuda_tensor");
            device_tensor(function, handle, CUDA_HANDLE_LEN, *offset_bytes, ring_bytes)
        }
        RingExport::Ascend { key, offset_bytes } => {
            let function = ("torch_npu.multiprocessing.reductions", "rebuild_npu_tensor");
            device_tensor(function, key, ASCEND_KEY_LEN, *offset_bytes, ring_bytes)
        }
    }
}

/// The fifteen arguments of torch's rebuild function for one `uint8` tensor of the ring's size.
fn device_tensor(
    (module, function): (&str, &str),
    handle: &[u8],
    handle_len: usize,
    offset_bytes: u64,
    ring_bytes: u64,
) -> Result<Vec<u8>> {
    let handle = match handle.len() {
        len if len == handle_len => [&HANDLE_PREFIX, handle].concat(),
        len if len == handle_len + HANDLE_PREFIX.len() && handle[1] == HANDLE_PREFIX[1] => handle.to_vec(),
        len => {
            let message = format!("an IPC handle has {handle_len} bytes, this one has {len}");
            return Err(Error::new(ErrorKind::Internal, "open the ring", message));
        }
    };
    let mut p = Pickler::new(512);
    p.global(module, function);
    p.begin();
    p.global("torch", "Tensor");
    p.int_tuple(&[ring_bytes]); // size
    p.int_tuple(&[1]); // stride
    p.int(0); // offset in elements
    p.global("torch.storage", "TypedStorage");
    p.global("torch", "uint8");
    p.int(0); // device: the worker puts its own here
    p.bytes(&handle);
    p.int(ring_bytes); // storage size
    p.int(offset_bytes); // storage offset in the block
    p.bool(false); // requires grad
    p.bytes(b""); // reference counter file: none
    p.int(0); // slot in it
    p.bytes(&[0; CUDA_HANDLE_LEN]); // event handle
    p.bool(false); // wait for the event: the bytes are ready before each message
    p.end_tuple();
    p.short_tuple(ShortTuple::Two);
    Ok(p.finish())
}

/// Message 2: a list of dicts.
pub(super) fn bucket(message: &BucketMessage) -> Result<Vec<u8>> {
    let names: usize = message.tensors.iter().map(|t| t.meta.name.len()).sum();
    let mut p = Pickler::new(names + message.tensors.len() * 40 + 128);
    let mut keys = [None; 4];
    let mut dtypes: Vec<(DType, Option<Memo>)> = Vec::new();
    p.list();
    p.begin();
    for tensor in &message.tensors {
        let meta = &tensor.meta;
        let [name, dtype, shape, offset] = &mut keys;
        p.dict();
        p.begin();
        p.shared(name, |p| p.str("name"));
        p.str(&meta.name);
        p.shared(dtype, |p| p.str("dtype"));
        let known = match dtypes.iter().position(|(d, _)| *d == meta.dtype) {
            Some(known) => known,
            None => {
                check_dtype(meta)?;
                dtypes.push((meta.dtype, None));
                dtypes.len() - 1
            }
        };
        p.shared(&mut dtypes[known].1, |p| p.global("torch", meta.dtype.torch_name()));
        p.shared(shape, |p| p.str("shape"));
        p.int_tuple(&meta.torch_shape().ok_or_else(|| odd_pairs(meta))?);
        p.shared(offset, |p| p.str("offset"));
        p.int(tensor.offset);
        p.end_dict();
    }
    p.end_list();
    Ok(p.finish())
}

/// Message 3: an exception for the worker to raise.
pub(super) fn exception(text: &str) -> Vec<u8> {
    let mut p = Pickler::new(text.len() + 64);
    p.global("builtins", "RuntimeError");
    p.str(text);
    p.short_tuple(ShortTuple::One);
    p.call();
    p.finish()
}

/// Messages 4 and 5.
pub(super) fn none() -> Vec<u8> {
    let mut p = Pickler::new(4);
    p.none();
    p.finish()
}

fn check_dtype(meta: &TensorMeta) -> Result<()> {
    match meta.dtype {
        DType::F6_E2M3 | DType::F6_E3M2 => Err(unsupported(
            meta,
            format!(
                "torch has no dtype for {}, so no torch worker can take it; use the native worker protocol",
                meta.dtype.safetensors_name()
            ),
        )),
        _ => Ok(()),
    }
}

fn odd_pairs(meta: &TensorMeta) -> Error {
    let shape = format_shape(&meta.shape);
    unsupported(
        meta,
        format!("torch packs 4-bit elements in pairs along the last dimension, which does not fit {shape}"),
    )
}

fn unsupported(meta: &TensorMeta, message: String) -> Error {
    Error::new(ErrorKind::Unsupported, "deliver a bucket", message).with(Key::Tensor, &meta.name)
}

#[cfg(test)]
#[path = "ce_message_tests.rs"]
mod tests;
