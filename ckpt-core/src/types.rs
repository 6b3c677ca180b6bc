//! Words shared by every module: ranks, versions, element types, shapes.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

/// A process's number in the world, as torchrun, Slurm or Open MPI give it.
pub type Rank = u32;

/// Counts attempts at an update over the life of a job. Whatever belongs to an older epoch is never published.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The number of a set of weights; a later one is larger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version(pub u64);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

macro_rules! dtypes {
    ($($variant:ident, $bits:literal, $safetensors:literal, $torch:literal, $doc:literal;)*) => {
        /// The type of a tensor's elements: every type that safetensors can hold.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[non_exhaustive]
        #[allow(non_camel_case_types, reason = "the names of the formats, as published")]
        pub enum DType { $(#[doc = $doc] $variant,)* }

        impl DType {
            /// Every element type.
            pub const ALL: &'static [DType] = &[$(DType::$variant),*];

            /// Bits of one element.
            pub const fn bits(self) -> u32 { match self { $(DType::$variant => $bits),* } }

            /// The name in a safetensors header, `BF16`.
            pub const fn safetensors_name(self) -> &'static str { match self { $(DType::$variant => $safetensors),* } }

            /// The name of torch's dtype without the module, `bfloat16`.
            pub const fn torch_name(self) -> &'static str { match self { $(DType::$variant => $torch),* } }
        }
    };
}

dtypes! {
    BOOL, 8, "BOOL", "bool", "A boolean, one byte.";
    F4, 4, "F4", "float4_e2m1fn_x2", "MXFP4 and NVFP4 elements, two in a byte.";
    F6_E2M3, 6, "F6_E2M3", "float6_e2m3fn", "A 6-bit float; torch has no such dtype.";
    F6_E3M2, 6, "F6_E3M2", "float6_e3m2fn", "A 6-bit float; torch has no such dtype.";
    U8, 8, "U8", "uint8", "Unsigned, 8 bits.";
    I8, 8, "I8", "int8", "Signed, 8 bits.";
    F8_E5M2, 8, "F8_E5M2", "float8_e5m2", "FP8 with 5 exponent bits.";
    F8_E4M3, 8, "F8_E4M3", "float8_e4m3fn", "FP8 with 4 exponent bits.";
    F8_E8M0, 8, "F8_E8M0", "float8_e8m0fnu", "A block scale: exponent only.";
    F8_E4M3FNUZ, 8, "F8_E4M3FNUZ", "float8_e4m3fnuz", "FP8 of AMD's MI300 generation.";
    F8_E5M2FNUZ, 8, "F8_E5M2FNUZ", "float8_e5m2fnuz", "FP8 of AMD's MI300 generation.";
    I16, 16, "I16", "int16", "Signed, 16 bits.";
    U16, 16, "U16", "uint16", "Unsigned, 16 bits.";
    F16, 16, "F16", "float16", "IEEE half.";
    BF16, 16, "BF16", "bfloat16", "Brain float.";
    I32, 32, "I32", "int32", "Signed, 32 bits.";
    U32, 32, "U32", "uint32", "Unsigned, 32 bits.";
    F32, 32, "F32", "float32", "IEEE single.";
    C64, 64, "C64", "complex64", "Two IEEE singles.";
    F64, 64, "F64", "float64", "IEEE double.";
    I64, 64, "I64", "int64", "Signed, 64 bits.";
    U64, 64, "U64", "uint64", "Unsigned, 64 bits.";
}

impl DType {
    /// From a safetensors name; `None` for a name that this version does not know.
    pub fn from_safetensors(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|d| d.safetensors_name() == name)
    }

    /// From torch's name, with or without `torch.` before it.
    pub fn from_torch(name: &str) -> Option<Self> {
        let name = name.strip_prefix("torch.").unwrap_or(name);
        Self::ALL.iter().copied().find(|d| d.torch_name() == name)
    }
}

/// Prints torch's full name, `torch.bfloat16`.
impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "torch.{}", self.torch_name())
    }
}

/// Name, element type and shape of one tensor. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TensorMeta {
    /// The parameter's name, unique in a checkpoint.
    pub name: Arc<str>,
    /// Element type.
    pub dtype: DType,
    /// Shape in elements; empty for a scalar, may hold zeros.
    pub shape: Arc<[u64]>,
}

impl TensorMeta {
    /// Makes a meta and checks that its size is representable and ends on a byte.
    pub fn new(name: impl Into<Arc<str>>, dtype: DType, shape: impl Into<Arc<[u64]>>) -> Result<Self> {
        let meta = Self { name: name.into(), dtype, shape: shape.into() };
        meta.checked_len_bytes().ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                "read tensor metadata",
                format!(
                    "{} elements of {dtype} are too many or do not end on a byte",
                    format_shape(&meta.shape)
                ),
            )
            .with(crate::Key::Tensor, &meta.name)
        })?;
        Ok(meta)
    }

    /// Bytes of the tensor; `None` if they are not representable or do not end on a byte.
    pub fn checked_len_bytes(&self) -> Option<u64> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        let elements = self.shape.iter().try_fold(1_u64, |n, d| n.checked_mul(*d))?;
        let bits = elements.checked_mul(u64::from(self.dtype.bits()))?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// The shape that torch gives this tensor: it counts two [`DType::F4`] elements as one. `None` if it has no such
    /// shape, because the last dimension is odd.
    pub fn torch_shape(&self) -> Option<Arc<[u64]>> {
        if self.dtype != DType::F4 {
            return Some(self.shape.clone());
        }
        let (last, rest) = self.shape.split_last()?;
        last.is_multiple_of(2).then(|| rest.iter().copied().chain([last / 2]).collect())
    }

    /// From the shape that torch gives a tensor: see [`Self::torch_shape`].
    pub fn from_torch(name: impl Into<Arc<str>>, dtype: DType, shape: &[u64]) -> Result<Self> {
        match (dtype, shape.split_last()) {
            (DType::F4, Some((last, rest))) => {
                let doubled: Arc<[u64]> = rest.iter().copied().chain([last.saturating_mul(2)]).collect();
                Self::new(name, dtype, doubled)
            }
            (DType::F4, None) => Self::new(name, dtype, [2]),
            _ => Self::new(name, dtype, shape),
        }
    }

    /// Bytes of the tensor, contiguous; 0 for a tensor that was built around [`TensorMeta::new`] and overflows.
    pub fn len_bytes(&self) -> u64 {
        self.checked_len_bytes().unwrap_or(0)
    }
}

/// `[151936, 4096]`.
pub fn format_shape(shape: &[u64]) -> String {
    format!("[{}]", shape.iter().map(u64::to_string).collect::<Vec<_>>().join(", "))
}

/// Tensors start at multiples of this many bytes, in memory and in a bucket, as checkpoint-engine does it.
pub const TENSOR_ALIGNMENT: u64 = 256;

/// `len` rounded up to [`TENSOR_ALIGNMENT`]; saturates instead of overflowing.
pub const fn align_up(len: u64) -> u64 {
    match len.checked_add(TENSOR_ALIGNMENT - 1) {
        Some(n) => n / TENSOR_ALIGNMENT * TENSOR_ALIGNMENT,
        None => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for dtype in DType::ALL {
            assert_eq!(DType::from_safetensors(dtype.safetensors_name()), Some(*dtype));
            assert_eq!(DType::from_torch(&dtype.to_string()), Some(*dtype));
        }
    }

    #[test]
    fn torch_counts_packed_pairs() {
        let packed = TensorMeta::new("t", DType::F4, [3, 8]).unwrap();
        assert_eq!(&*packed.torch_shape().unwrap(), &[3, 4]);
        assert_eq!(TensorMeta::from_torch("t", DType::F4, &[3, 4]).unwrap(), packed);
        assert_eq!(TensorMeta::from_torch("t", DType::F4, &[]).unwrap().len_bytes(), 1);
        assert!(TensorMeta::from_torch("t", DType::F4, &[u64::MAX]).is_err());
        assert_eq!(TensorMeta::new("t", DType::F4, [4, 3]).unwrap().torch_shape(), None);
        let plain = TensorMeta::new("t", DType::BF16, [3, 8]).unwrap();
        assert_eq!(plain.torch_shape(), Some(plain.shape.clone()));
        assert_eq!(TensorMeta::from_torch("t", DType::BF16, &[3, 8]).unwrap(), plain);
    }

    #[test]
    fn sizes() {
        let len = |dtype, shape: &[u64]| TensorMeta::new("t", dtype, shape).map(|t| t.len_bytes());
        assert_eq!(len(DType::BF16, &[3, 5]).unwrap(), 30);
        assert_eq!(len(DType::F32, &[]).unwrap(), 4);
        assert_eq!(len(DType::F32, &[u64::MAX, 0]).unwrap(), 0);
        assert_eq!(len(DType::F4, &[6]).unwrap(), 3);
        assert!(len(DType::F4, &[3]).is_err());
        assert!(len(DType::F64, &[u64::MAX, 2]).is_err());
    }
}
