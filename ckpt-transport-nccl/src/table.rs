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

/// Opens the first of `candidates` that can be opened, for ever: the libraries in question start threads and keep
/// state that does not survive an unload. The error lists every attempt.
pub(crate) fn open_first(
    candidates: &[std::path::PathBuf],
) -> Result<(std::path::PathBuf, &'static libloading::Library), String> {
    let mut tried = Vec::new();
    for candidate in candidates {
        // SAFETY: the initializers of vendors' libraries that a user asked for; nothing is called yet.
        match unsafe { libloading::Library::new(candidate) } {
            Ok(library) => return Ok((candidate.clone(), Box::leak(Box::new(library)))),
            Err(error) => tried.push(format!("{}: {}", candidate.display(), reason(&error))),
        }
    }
    Err(tried.join("; "))
}

/// The loader's own text; libloading's `Display` leaves it out or repeats the path.
fn reason(error: &libloading::Error) -> String {
    match error {
        libloading::Error::DlOpen { source, .. } => {
            let text = source.to_string();
            let file = text.split(':').next().unwrap_or_default();
            let text = text.strip_prefix(file).map_or(text.as_str(), |rest| rest.trim_start_matches(": "));
            text.to_owned()
        }
        other => other.to_string(),
    }
}
