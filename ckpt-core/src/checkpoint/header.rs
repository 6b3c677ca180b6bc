//! The header of a safetensors file. The `safetensors` crate checks it; here are the limits and the messages.

use std::{borrow::Cow, collections::HashSet, fmt, fs::File, io, os::unix::fs::FileExt, path::Path};

use safetensors::tensor::Metadata;
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, MapAccess, Visitor},
};

use super::memory::file_error;
use crate::{
    error::{Error, ErrorKind, Key, Result},
    types::{DType, TensorMeta},
};

/// The format's own limit; a larger header is an error, not an allocation.
const MAX_HEADER_BYTES: u64 = 100_000_000;
const LENGTH_BYTES: u64 = 8;

/// One tensor of a file.
#[derive(Debug)]
pub(crate) struct HeaderTensor {
    pub meta: TensorMeta,
    /// Bytes from the file's start.
    pub offset: u64,
}

/// Reads the tensors of a file in the order of their bytes. A file of 0 bytes has none.
pub(super) fn read_header(file: &File, path: &Path, file_len: u64) -> Result<Vec<HeaderTensor>> {
    read_header_of(|bytes, offset| file.read_exact_at(bytes, offset), path, file_len)
}

/// The same of whatever `read_at` reads.
pub(crate) fn read_header_of(
    read_at: impl Fn(&mut [u8], u64) -> io::Result<()>,
    path: &Path,
    file_len: u64,
) -> Result<Vec<HeaderTensor>> {
    let corrupt = |message: String| {
        Error::new(ErrorKind::Corrupt, "read safetensors header", message).with(Key::Path, path.display())
    };
    if file_len == 0 {
        return Ok(Vec::new());
    }
    if file_len < LENGTH_BYTES {
        return Err(corrupt(format!(
            "the file has {file_len} bytes, a safetensors file at least 8; fetch it again"
        )));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    read_at(&mut length, 0).map_err(|e| file_error("read safetensors header", path, e))?;
    let header_len = u64::from_le_bytes(length);
    if header_len > MAX_HEADER_BYTES {
        return Err(corrupt(format!(
            "the header claims {header_len} bytes, more than the format's limit of {MAX_HEADER_BYTES}; \
             this is not a safetensors file"
        )));
    }
    let data_start = LENGTH_BYTES + header_len;
    if data_start > file_len {
        return Err(corrupt(format!(
            "the header claims {header_len} bytes, but the file has only {file_len}; fetch it again"
        )));
    }
    let mut header = vec![0; header_len as usize];
    read_at(&mut header, LENGTH_BYTES).map_err(|e| file_error("read safetensors header", path, e))?;
    let invalid = |e: serde_json::Error| corrupt(format!("the header is not valid: {e}"));
    serde_json::from_slice::<UniqueNames>(&header).map_err(invalid)?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(invalid)?;
    let expected = (metadata.data_len() as u64).checked_add(data_start);
    if expected != Some(file_len) {
        return Err(corrupt(format!(
            "the header describes {} bytes of tensors, but {} follow it; the file is incomplete or has a tail, fetch it \
             again",
            metadata.data_len(),
            file_len - data_start
        )));
    }
    let names = metadata.offset_keys();
    let mut tensors = Vec::with_capacity(names.len());
    for name in names {
        let Some(info) = metadata.info(&name) else { continue };
        let Some(dtype) = DType::from_safetensors(&info.dtype.to_string()) else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "read safetensors header",
                format!("the element type {} is not known to this version", info.dtype),
            )
            .with(Key::Path, path.display())
            .with(Key::Tensor, name));
        };
        let shape: Vec<u64> = info.shape.iter().map(|d| *d as u64).collect();
        let meta = TensorMeta::new(name, dtype, shape).map_err(|e| e.with(Key::Path, path.display()))?;
        tensors.push(HeaderTensor { meta, offset: data_start + info.data_offsets.0 as u64 });
    }
    Ok(tensors)
}

/// An object whose names are all different: parsers of JSON take the last one of equals without a word.
struct UniqueNames;

impl<'de> Deserialize<'de> for UniqueNames {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = UniqueNames;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<UniqueNames, A::Error> {
                let mut seen = HashSet::new();
                while let Some(name) = map.next_key::<Cow<'de, str>>()? {
                    if seen.contains(&name) {
                        return Err(A::Error::custom(format_args!("it has two entries `{name}`")));
                    }
                    map.next_value::<IgnoredAny>()?;
                    seen.insert(name);
                }
                Ok(UniqueNames)
            }
        }
        deserializer.deserialize_map(Names)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read(bytes: &[u8]) -> Result<Vec<HeaderTensor>> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        read_header(file.as_file(), file.path(), bytes.len() as u64)
    }

    fn with_header(json: &str, data: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.as_bytes());
        bytes.resize(bytes.len() + data, 1);
        bytes
    }

    #[test]
    fn every_dtype_of_the_format_is_known() {
        for dtype in DType::ALL {
            let name = dtype.safetensors_name();
            let len = u64::from(dtype.bits()); // eight elements
            let json = format!(r#"{{"t":{{"dtype":"{name}","shape":[8],"data_offsets":[0,{len}]}}}}"#);
            let tensors = read(&with_header(&json, len as usize)).unwrap();
            assert_eq!(tensors[0].meta.dtype, *dtype);
            assert_eq!(tensors[0].meta.len_bytes(), len);
        }
    }

    #[test]
    fn scalars_empty_tensors_and_empty_files() {
        assert!(read(b"").unwrap().is_empty());
        assert!(read(&with_header("{}", 0)).unwrap().is_empty());
        assert!(read(&with_header(r#"{"__metadata__":{"format":"pt"}}  "#, 0)).unwrap().is_empty());
        let json = r#"{"b":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{"dtype":"I8","shape":[0,3],"data_offsets":[4,4]}}"#;
        let tensors = read(&with_header(json, 4)).unwrap();
        let names: Vec<_> = tensors.iter().map(|t| &*t.meta.name).collect();
        assert_eq!(names, ["b", "a"], "in the order of the bytes");
        assert_eq!(tensors[0].offset, 8 + json.len() as u64);
        assert_eq!(tensors[1].meta.len_bytes(), 0);
    }

    #[test]
    fn hostile_headers_are_errors_that_name_the_file() {
        let t = |offsets: &str| format!(r#"{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}"#);
        let cases: Vec<(Vec<u8>, &str)> = vec![
            (b"abc".to_vec(), "at least 8"),
            (u64::MAX.to_le_bytes().to_vec(), "limit"),
            (1000_u64.to_le_bytes().to_vec(), "only 8"),
            (with_header("{", 0), "not valid"),
            (with_header("[]", 0), "not valid"),
            (with_header(&"[".repeat(100_000), 0), "not valid"),
            (with_header("\u{fffd}", 0), "not valid"),
            (with_header(&format!(r#"{{"a":{}}}"#, t("[0,8]")), 4), "incomplete"),
            (with_header(&format!(r#"{{"a":{}}}"#, t("[0,8]")), 12), "tail"),
            (with_header(&format!(r#"{{"a":{}}}"#, t("[8,16]")), 16), "`a`"),
            (with_header(&format!(r#"{{"a":{},"b":{}}}"#, t("[0,8]"), t("[4,12]")), 12), "`b`"),
            (with_header(&format!(r#"{{"a":{},"b":{}}}"#, t("[0,8]"), t("[12,20]")), 20), "`b`"),
            (with_header(&format!(r#"{{"a":{}}}"#, t("[8,0]")), 8), "not valid"),
            (with_header(&format!(r#"{{"a":{}}}"#, t("[-8,0]")), 8), "not valid"),
            (with_header(&format!(r#"{{"a":{}}}"#, t("[0,4]")), 4), "not valid"),
            (with_header(&format!(r#"{{"a":{0},"a":{0}}}"#, t("[0,8]")), 8), "two entries `a`"),
            (with_header(r#"{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}"#, 8), "not valid"),
            (with_header(r#"{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}"#, 4), "not valid"),
            (with_header(r#"{"a":{"dtype":"F3","shape":[2],"data_offsets":[0,8]}}"#, 8), "F3"),
            (with_header(r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#, 2), "not valid"),
            (
                with_header(
                    r#"{"a":{"dtype":"F64","shape":[4294967296,4294967296,2],"data_offsets":[0,8]}}"#,
                    8,
                ),
                "not valid",
            ),
        ];
        for (bytes, words) in cases {
            let error = read(&bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            assert!(error.to_string().contains(words), "{error} does not say {words:?}");
            assert!(error.get(Key::Path).is_some());
        }
    }
}
