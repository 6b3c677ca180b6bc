//! Function tables of CANN's libraries, which are opened at run time.
//!
//! Results are `i32`, never Rust enums: a newer library may return a code that this build does not know. Handles and
//! device pointers are integers: they are opaque here, and integers may cross threads.

use ckpt_core::transport::library::loader_reason;
use libloading::{Library, os::unix};

/// An opaque pointer of a native library: stream, event, communicator.
pub(crate) type Handle = usize;

/// Defines a struct of function pointers and `from_libraries`, which fills it or names the first missing symbol.
macro_rules! function_table {
    (
        $(#[$meta:meta])*
        struct $name:ident {
            required { $($field:ident = $symbol:literal: fn($($arg:ty),*) -> $ret:ty;)* }
            optional { $($maybe:ident = $maybe_symbol:literal: fn($($maybe_arg:ty),*) -> $maybe_ret:ty;)* }
        }
    ) => {
        $(#[$meta])*
        pub(crate) struct $name {
            $(pub(crate) $field: unsafe extern "C" fn($($arg),*) -> $ret,)*
            $(pub(crate) $maybe: Option<unsafe extern "C" fn($($maybe_arg),*) -> $maybe_ret>,)*
        }

        impl $name {
            /// # Safety
            /// The libraries must be those whose headers the signatures were taken from, and must stay loaded while the
            /// table is in use.
            pub(crate) unsafe fn from_libraries(
                libraries: &[&'static libloading::Library],
            ) -> Result<Self, &'static str> {
                Ok(Self {
                    $($field: libraries
                        .iter()
                        // SAFETY: the signature is the one in the library's header, by this function's contract.
                        .find_map(|l| unsafe { l.get::<unsafe extern "C" fn($($arg),*) -> $ret>($symbol) }.ok())
                        .map(|symbol| *symbol)
                        .ok_or($symbol)?,)*
                    $($maybe: libraries
                        .iter()
                        // SAFETY: as above.
                        .find_map(|l| unsafe {
                            l.get::<unsafe extern "C" fn($($maybe_arg),*) -> $maybe_ret>($maybe_symbol)
                        }.ok())
                        .map(|symbol| *symbol),)*
                })
            }
        }
    };
}

pub(crate) use function_table;

/// A loader for [`ckpt_core::transport::library::LibrarySearch::open`]. It makes the symbols global, since CANN's
/// libraries look for each other's, and never unloads: they start threads.
pub(crate) fn load(file: &std::ffi::OsStr) -> Result<&'static Library, String> {
    // SAFETY: the initialisers of vendors' libraries that a user or the system chose; nothing is called yet.
    match unsafe { unix::Library::open(Some(file), unix::RTLD_NOW | unix::RTLD_GLOBAL) } {
        Ok(library) => Ok(Box::leak(Box::new(library.into()))),
        Err(error) => Err(loader_reason(&error)),
    }
}
