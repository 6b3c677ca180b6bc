//! Writes Python pickles of protocol 4; nothing in this program ever reads one.
//!
//! Only what the worker link needs: globals, tuples, lists, dicts, strings, bytes, integers, booleans, `None`, and the
//! call of a global (an exception). Values are written in order, so a container is written around its items:
//! [`Pickler::begin`] leaves a mark, and the closing call takes everything after it.

/// A value that was remembered and can be written again in two bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Memo(u32);

/// A pickle under construction.
#[derive(Debug)]
pub(super) struct Pickler {
    out: Vec<u8>,
    memos: u32,
}

const MARK: u8 = b'(';
const STOP: u8 = b'.';
const PROTO: u8 = 0x80;
const NONE: u8 = b'N';
const NEWTRUE: u8 = 0x88;
const NEWFALSE: u8 = 0x89;
const BININT: u8 = b'J';
const BININT1: u8 = b'K';
const BININT2: u8 = b'M';
const LONG1: u8 = 0x8a;
const SHORT_BINBYTES: u8 = b'C';
const BINBYTES: u8 = b'B';
const BINBYTES8: u8 = 0x8e;
const SHORT_BINUNICODE: u8 = 0x8c;
const BINUNICODE: u8 = b'X';
const BINUNICODE8: u8 = 0x8d;
const EMPTY_TUPLE: u8 = b')';
const TUPLE: u8 = b't';
const TUPLE1: u8 = 0x85;
const TUPLE2: u8 = 0x86;
const TUPLE3: u8 = 0x87;
const EMPTY_LIST: u8 = b']';
const APPENDS: u8 = b'e';
const EMPTY_DICT: u8 = b'}';
const SETITEMS: u8 = b'u';
const GLOBAL: u8 = b'c';
const REDUCE: u8 = b'R';
const MEMOIZE: u8 = 0x94;
const BINGET: u8 = b'h';
const LONG_BINGET: u8 = b'j';

impl Pickler {
    /// An empty pickle with room for `capacity` bytes.
    pub(super) fn new(capacity: usize) -> Self {
        let mut out = Vec::with_capacity(capacity);
        out.extend_from_slice(&[PROTO, 4]);
        Self { out, memos: 0 }
    }

    /// Ends the pickle. Exactly one value must have been written.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.out.push(STOP);
        self.out
    }

    /// `None`.
    pub(super) fn none(&mut self) {
        self.out.push(NONE);
    }

    /// `True` or `False`.
    pub(super) fn bool(&mut self, value: bool) {
        self.out.push(if value { NEWTRUE } else { NEWFALSE });
    }

    /// An `int`, in the shortest form.
    pub(super) fn int(&mut self, value: impl Into<i128>) {
        let value = value.into();
        if let Ok(value) = u8::try_from(value) {
            self.out.extend_from_slice(&[BININT1, value]);
        } else if let Ok(value) = u16::try_from(value) {
            self.out.push(BININT2);
            self.out.extend_from_slice(&value.to_le_bytes());
        } else if let Ok(value) = i32::try_from(value) {
            self.out.push(BININT);
            self.out.extend_from_slice(&value.to_le_bytes());
        } else {
            let bytes = value.to_le_bytes();
            // Two's complement: the last byte kept must still show the sign.
            let magnitude = if value < 0 { !value } else { value };
            let len = (128 - magnitude.leading_zeros() as usize) / 8 + 1;
            self.out.extend_from_slice(&[LONG1, len as u8]);
            self.out.extend_from_slice(&bytes[..len]);
        }
    }

    /// A `str`.
    pub(super) fn str(&mut self, value: &str) {
        self.sized(value.as_bytes(), [SHORT_BINUNICODE, BINUNICODE, BINUNICODE8]);
    }

    /// A `bytes`.
    pub(super) fn bytes(&mut self, value: &[u8]) {
        self.sized(value, [SHORT_BINBYTES, BINBYTES, BINBYTES8]);
    }

    fn sized(&mut self, value: &[u8], [short, medium, long]: [u8; 3]) {
        if let Ok(len) = u8::try_from(value.len()) {
            self.out.extend_from_slice(&[short, len]);
        } else if let Ok(len) = u32::try_from(value.len()) {
            self.out.push(medium);
            self.out.extend_from_slice(&len.to_le_bytes());
        } else {
            self.out.push(long);
            self.out.extend_from_slice(&(value.len() as u64).to_le_bytes());
        }
        self.out.extend_from_slice(value);
    }

    /// Something that a module defines: a function, class or constant.
    pub(super) fn global(&mut self, module: &str, name: &str) {
        debug_assert!(!module.contains('\n') && !name.contains('\n'), "a global's name ends at a line break");
        self.out.push(GLOBAL);
        for part in [module, name] {
            self.out.extend_from_slice(part.as_bytes());
            self.out.push(b'\n');
        }
    }

    /// Starts a tuple of four or more, or the items of a list or dict.
    pub(super) fn begin(&mut self) {
        self.out.push(MARK);
    }

    /// A tuple of everything since [`Self::begin`].
    pub(super) fn end_tuple(&mut self) {
        self.out.push(TUPLE);
    }

    /// A tuple of the `len` values before it, for up to three.
    pub(super) fn short_tuple(&mut self, len: ShortTuple) {
        self.out.push(match len {
            ShortTuple::Zero => EMPTY_TUPLE,
            ShortTuple::One => TUPLE1,
            ShortTuple::Two => TUPLE2,
            ShortTuple::Three => TUPLE3,
        });
    }

    /// A tuple of integers.
    pub(super) fn int_tuple(&mut self, values: &[u64]) {
        let short = ShortTuple::of(values.len());
        if short.is_none() {
            self.begin();
        }
        for value in values {
            self.int(*value);
        }
        match short {
            Some(len) => self.short_tuple(len),
            None => self.end_tuple(),
        }
    }

    /// An empty list; [`Self::begin`], items and [`Self::end_list`] fill it.
    pub(super) fn list(&mut self) {
        self.out.push(EMPTY_LIST);
    }

    /// Appends everything since [`Self::begin`] to the list before it.
    pub(super) fn end_list(&mut self) {
        self.out.push(APPENDS);
    }

    /// An empty dict; [`Self::begin`], keys each with its value, and [`Self::end_dict`] fill it.
    pub(super) fn dict(&mut self) {
        self.out.push(EMPTY_DICT);
    }

    /// Sets everything since [`Self::begin`] in the dict before it.
    pub(super) fn end_dict(&mut self) {
        self.out.push(SETITEMS);
    }

    /// Calls the global with the tuple written after it, when Python loads the pickle.
    pub(super) fn call(&mut self) {
        self.out.push(REDUCE);
    }

    /// Remembers the value just written.
    pub(super) fn memoize(&mut self) -> Memo {
        self.out.push(MEMOIZE);
        self.memos += 1;
        Memo(self.memos - 1)
    }

    /// Writes a remembered value again.
    pub(super) fn again(&mut self, memo: Memo) {
        if let Ok(number) = u8::try_from(memo.0) {
            self.out.extend_from_slice(&[BINGET, number]);
        } else {
            self.out.push(LONG_BINGET);
            self.out.extend_from_slice(&memo.0.to_le_bytes());
        }
    }

    /// Writes what `write` writes, once; later the remembered value.
    pub(super) fn shared(&mut self, memo: &mut Option<Memo>, write: impl FnOnce(&mut Self)) {
        match *memo {
            Some(memo) => self.again(memo),
            None => {
                write(self);
                *memo = Some(self.memoize());
            }
        }
    }
}

/// The lengths for which a tuple needs no mark.
#[derive(Clone, Copy, Debug)]
pub(super) enum ShortTuple {
    /// `()`
    Zero,
    /// `(a,)`
    One,
    /// `(a, b)`
    Two,
    /// `(a, b, c)`
    Three,
}

impl ShortTuple {
    pub(super) fn of(len: usize) -> Option<Self> {
        match len {
            0 => Some(Self::Zero),
            1 => Some(Self::One),
            2 => Some(Self::Two),
            3 => Some(Self::Three),
            _ => None,
        }
    }
}

#[cfg(test)]
#[path = "pickle_tests.rs"]
pub(super) mod tests;
