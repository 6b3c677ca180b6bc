//! Function tables of libraries that are opened at run time.
//!
//! Results are `i32`, never Rust enums: a newer library may return a code that this build does not know. Handles are
//! `usize`: they are opaque here, and plain integers may cross threads.

/// An opaque pointer of a native library: context, stream, event, communicator.
pub(crate) type Handle = usize;

/// Defines a struct of function pointers and `from_library`, which fills it or names the first missing symbol.
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
            /// `library` must be the one whose headers the signatures were taken from, and must stay loaded while the
            /// table is in use.
            pub(crate) unsafe fn from_library(library: &libloading::Library) -> Result<Self, &'static str> {
                Ok(Self {
                    // SAFETY: the signature is the one in the library's header, by this function's contract.
                    $($field: *unsafe {
                        library.get::<unsafe extern "C" fn($($arg),*) -> $ret>($symbol)
                    }.map_err(|_| $symbol)?,)*
                    // SAFETY: as above.
                    $($maybe: unsafe {
                        library.get::<unsafe extern "C" fn($($maybe_arg),*) -> $maybe_ret>($maybe_symbol)
                    }.ok().map(|symbol| *symbol),)*
                })
            }
        }
    };
}

pub(crate) use function_table;

/// A loader for [`ckpt_core::transport::library::LibrarySearch::open`] that never unloads: the libraries in question
/// start threads and keep state that does not survive it.
pub(crate) fn load(file: &std::ffi::OsStr) -> Result<&'static libloading::Library, String> {
    // SAFETY: the initializers of vendors' libraries that a user asked for; nothing is called yet.
    match unsafe { libloading::Library::new(file) } {
        Ok(library) => Ok(Box::leak(Box::new(library))),
        Err(error) => Err(ckpt_core::transport::library::loader_reason(&error)),
    }
}
