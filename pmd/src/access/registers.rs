//! Registers by name: a table that reads like the datasheet, typed bits, and waits that end.

use std::fmt;
use std::marker::PhantomData;
use std::ops::BitOr;
use std::time::Duration;

use super::{Bar, GONE};

/// Declares registers, a line each: name, offset, access, and the bits that the driver uses. Arrays have a stride, and their name
/// takes an index, of which there are as many as the brackets say. All of them are also in `TABLE`, for who looks at a card.
///
/// Access is `ro`, `wo` or `rw`; `rc` and `rcw` are read and written likewise, and reading them changes them: only the driver may.
///
/// ```
/// pmd::registers! {
///     /// Receive control (datasheet 10.2.5.1).
///     RCTL @ 0x0100 rw { 1 => EN, 15 => BAM, 16..=17 => BSIZE }
///     /// Receive descriptor base (datasheet 10.2.5.6).
///     RDBAL @ 0x2800 + 0x100 * queue[2] rw {}
/// }
/// use pmd::access::Register;
/// assert_eq!((RDBAL(1).offset(), RCTL.offset()), (0x2900, 0x100));
/// assert_eq!((RCTL::EN | RCTL::BSIZE.is(3)).value(), 0x0003_0002);
/// assert_eq!((TABLE[1].name, TABLE[1].count), ("RDBAL", 2));
/// ```
#[macro_export]
macro_rules! registers {
    ($($(#[$doc:meta])* $name:ident @ $base:literal $(+ $stride:literal * $index:ident [$count:literal])? $access:ident
        { $($low:literal $(..= $high:literal)? => $field:ident),* $(,)? })*) => {
        /// All registers of this table.
        #[allow(dead_code, unreachable_pub)]
        pub const TABLE: &[$crate::access::Entry] = &[$($crate::access::Entry {
            name: stringify!($name),
            base: $base,
            stride: 0 $(+ $stride)?,
            count: 0 $(+ $count)?,
            may_look: $crate::registers!(@may_look $access),
            fields: <$name as $crate::access::Register>::FIELDS,
        }),*];
        $($crate::registers!(@declare [$(#[$doc])*] $name @ $base $(+ $stride * $index)? $access
            { $($low $(..= $high)? => $field),* });)*
    };
    (@declare [$(#[$doc:meta])*] $name:ident @ $base:literal $access:ident
        { $($low:literal $(..= $high:literal)? => $field:ident),* }) => {
        $(#[$doc])*
        #[allow(non_camel_case_types, clippy::upper_case_acronyms, unreachable_pub)]
        #[derive(Clone, Copy, Debug)]
        pub struct $name;
        $crate::registers!(@one $name, $base, None, self, $access { $($low $(..= $high)? => $field),* });
    };
    (@declare [$(#[$doc:meta])*] $name:ident @ $base:literal + $stride:literal * $index:ident $access:ident
        { $($low:literal $(..= $high:literal)? => $field:ident),* }) => {
        $(#[$doc])*
        #[allow(non_camel_case_types, clippy::upper_case_acronyms, unreachable_pub)]
        #[derive(Clone, Copy, Debug)]
        pub struct $name(pub u32);
        $crate::registers!(@one $name, $base + $stride * self.0, Some(self.0), self,
            $access { $($low $(..= $high)? => $field),* });
    };
    (@one $name:ident, $offset:expr, $index:expr, $self:ident,
        $access:ident { $($low:literal $(..= $high:literal)? => $field:ident),* }) => {
        impl $crate::access::Register for $name {
            const NAME: &'static str = stringify!($name);
            const FIELDS: &'static [(&'static str, u32)] =
                &[$((stringify!($field), $crate::registers!(@mask $low $(..= $high)?))),*];
            #[inline(always)]
            fn offset($self) -> u32 {
                $offset
            }
            fn index($self) -> Option<u32> {
                $index
            }
        }
        #[allow(missing_docs, dead_code, unreachable_pub)] // the datasheet has them
        impl $name {
            $($crate::registers!(@field $name $low $(..= $high)? => $field);)*
        }
        $crate::registers!(@access $name $access);
    };
    (@mask $bit:literal) => { 1u32 << $bit };
    (@mask $low:literal ..= $high:literal) => { (u32::MAX >> (31 - $high)) & (u32::MAX << $low) };
    (@field $name:ident $bit:literal => $field:ident) => {
        pub const $field: $crate::access::Bits<$name> = $crate::access::Bits::new(1 << $bit);
    };
    (@field $name:ident $low:literal ..= $high:literal => $field:ident) => {
        pub const $field: $crate::access::Field<$name> = $crate::access::Field::new($low, $high);
    };
    (@may_look ro) => { true };
    (@may_look rw) => { true };
    (@may_look $other:ident) => { false };
    (@access $name:ident rc) => { $crate::registers!(@access $name ro); };
    (@access $name:ident rcw) => { $crate::registers!(@access $name rw); };
    (@access $name:ident ro) => { impl $crate::access::Readable for $name {} };
    (@access $name:ident wo) => { impl $crate::access::Writable for $name {} };
    (@access $name:ident rw) => {
        impl $crate::access::Readable for $name {}
        impl $crate::access::Writable for $name {}
    };
}

/// A register of 32 bits, as [`crate::registers!`] declares it.
pub trait Register: Copy {
    /// As the datasheet calls it.
    const NAME: &'static str;
    /// Its fields, and the bits of each.
    const FIELDS: &'static [(&'static str, u32)];
    /// Where it is, in bytes.
    fn offset(self) -> u32;
    /// Which of an array.
    fn index(self) -> Option<u32>;
}

/// A line of a table of registers, or an array of them.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// As the datasheet calls it.
    pub name: &'static str,
    /// Where it is, or the first of the array, in bytes.
    pub base: u32,
    /// From one of the array to the next.
    pub stride: u32,
    /// How many the array has; 0: it is no array.
    pub count: u32,
    /// Reading it changes nothing.
    pub may_look: bool,
    /// Its fields, and the bits of each.
    pub fields: &'static [(&'static str, u32)],
}

/// What a register read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// As the datasheet calls it.
    pub name: &'static str,
    /// Which of an array.
    pub index: Option<u32>,
    /// Where it is, in bytes.
    pub offset: u32,
    /// What it read.
    pub value: u32,
    /// The fields that the driver uses, as they read.
    pub fields: Vec<(&'static str, u32)>,
}

/// A register that may hold anything while its device is stopped, and the bits of it that do.
#[derive(Clone, Copy, Debug)]
pub struct Scratch {
    name: &'static str,
    index: Option<u32>,
    offset: u32,
    bits: u32,
}

impl Scratch {
    /// `bits` of `register`.
    pub fn new<R: Readable + Writable>(register: R, bits: u32) -> Self {
        Self { name: R::NAME, index: register.index(), offset: register.offset(), bits }
    }

    /// `bits` of each register `name` of `table`.
    pub fn all(table: &[Entry], name: &str, bits: u32) -> impl Iterator<Item = Self> {
        table.iter().filter(move |entry| entry.name == name).flat_map(move |entry| {
            let &Entry { name, base, stride, count, .. } = entry;
            (0..count.max(1)).map(move |i| {
                let index = (count > 0).then_some(i);
                Self { name, index, offset: base + stride * i, bits }
            })
        })
    }
}

/// A register that may be read.
pub trait Readable: Register {}

/// A register that may be written.
pub trait Writable: Register {}

/// Bits of register `R`.
pub struct Bits<R>(u32, PhantomData<R>);

impl<R> Bits<R> {
    /// The bits of `value`.
    pub const fn new(value: u32) -> Self {
        Self(value, PhantomData)
    }

    /// As the register has them.
    pub const fn value(self) -> u32 {
        self.0
    }

    /// Whether all of them are set in `value`.
    #[inline(always)]
    pub const fn are_in(self, value: u32) -> bool {
        value & self.0 == self.0
    }
}

impl<R> Clone for Bits<R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R> Copy for Bits<R> {}

impl<R> BitOr for Bits<R> {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self::new(self.0 | other.0)
    }
}

/// Several bits of register `R` that are one number.
pub struct Field<R> {
    low: u32,
    high: u32,
    register: PhantomData<R>,
}

impl<R> Field<R> {
    /// Bits `low` to `high`, both included.
    pub const fn new(low: u32, high: u32) -> Self {
        Self { low, high, register: PhantomData }
    }

    const fn mask(&self) -> u32 {
        u32::MAX >> (31 - (self.high - self.low))
    }

    /// The bits when the field is `value`, of which no more is taken than fits.
    pub const fn is(&self, value: u32) -> Bits<R> {
        Bits::new((value & self.mask()) << self.low)
    }

    /// The field in a register that reads `value`.
    pub const fn of(&self, value: u32) -> u32 {
        value >> self.low & self.mask()
    }
}

/// How a wait for a register ended badly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WaitError {
    /// The bits did not become what they should.
    #[error("{register}: wanted {wanted:#x}, read {got:#x} for {waited:?}")]
    Timeout {
        /// Register and bits, as `RXDCTL[1].ENABLE`.
        register: String,
        /// What these bits should have become.
        wanted: u32,
        /// What they were at the end.
        got: u32,
        /// For how long it was looked at.
        waited: Duration,
    },
    /// The device is not there any more.
    #[error("{register} reads all ones: the device is gone")]
    Gone {
        /// The register.
        register: String,
    },
}

/// Names register `r`, and those of its fields that `mask` touches.
struct Name<R>(R, u32);

impl<R: Register> fmt::Display for Name<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(R::NAME)?;
        if let Some(i) = self.0.index() {
            write!(f, "[{i}]")?;
        }
        let touched = R::FIELDS.iter().filter(|(_, bits)| bits & self.1 != 0);
        for (i, (field, _)) in touched.enumerate() {
            write!(f, "{}{field}", if i == 0 { '.' } else { '|' })?;
        }
        Ok(())
    }
}

/// The registers of a region, by name.
pub struct Regs<B>(B);

impl<B: Bar> Regs<B> {
    /// Those of `bar`.
    pub fn new(bar: B) -> Self {
        Self(bar)
    }

    /// Reads `register`.
    #[inline(always)]
    pub fn read<R: Readable>(&self, register: R) -> u32 {
        self.0.read32(register.offset())
    }

    /// Writes `bits`, and zero to all others.
    #[inline(always)]
    pub fn write<R: Writable>(&self, register: R, bits: Bits<R>) {
        self.0.write32(register.offset(), bits.0);
    }

    /// Writes a number.
    #[inline(always)]
    pub fn write_number<R: Writable>(&self, register: R, value: u32) {
        self.0.write32(register.offset(), value);
    }

    /// Sets `bits` and leaves the others.
    pub fn set<R: Readable + Writable>(&self, register: R, bits: Bits<R>) {
        self.write_number(register, self.read(register) | bits.0);
    }

    /// Clears `bits` and leaves the others.
    pub fn clear<R: Readable + Writable>(&self, register: R, bits: Bits<R>) {
        self.write_number(register, self.read(register) & !bits.0);
    }

    /// Makes posted writes arrive: a read waits for them (PCI Express 4.0, section 2.4.1).
    pub fn flush<R: Readable>(&self, register: R) {
        let _ = self.read(register);
    }

    /// Lets time pass.
    pub fn pause(&self, time: Duration) {
        self.0.pause(time);
    }

    /// Reads all registers of a table that may be looked at.
    pub fn look(&self, table: &[Entry]) -> Vec<Reading> {
        let one = |entry: &Entry, index: Option<u32>| {
            let offset = entry.base + entry.stride * index.unwrap_or(0);
            let value = self.0.read32(offset);
            let fields = entry
                .fields
                .iter()
                .map(|&(name, mask)| (name, (value & mask) >> mask.trailing_zeros().min(31)));
            Reading { name: entry.name, index, offset, value, fields: fields.collect() }
        };
        let each = |entry: &'_ Entry| match entry.count {
            0 => vec![one(entry, None)],
            count => (0..count).map(|index| one(entry, Some(index))).collect(),
        };
        table.iter().filter(|entry| entry.may_look).flat_map(each).collect()
    }

    /// Writes patterns to registers and reads them back; leaves what was there. The device is stopped.
    ///
    /// # Errors
    /// One holds something else.
    pub fn hold_patterns(&self, scratch: &[Scratch]) -> Result<(), WaitError> {
        for at in scratch {
            let before = self.0.read32(at.offset);
            for pattern in [0x5a5a_5a5a, 0xa5a5_a5a5, 0, u32::MAX] {
                self.0.write32(at.offset, pattern & at.bits);
                let (wanted, got) = (pattern & at.bits, self.0.read32(at.offset) & at.bits);
                if got != wanted {
                    let register =
                        at.index.map_or(at.name.to_owned(), |index| format!("{}[{index}]", at.name));
                    return Err(WaitError::Timeout { register, wanted, got, waited: Duration::ZERO });
                }
            }
            self.0.write32(at.offset, before);
        }
        Ok(())
    }

    /// Waits until all of `bits` are set, for at most `limit`.
    ///
    /// # Errors
    /// [`WaitError`], at the limit or when the device is gone.
    pub fn wait_set<R: Readable>(
        &self,
        register: R,
        bits: Bits<R>,
        limit: Duration,
    ) -> Result<(), WaitError> {
        self.wait(register, bits, bits.0, limit)
    }

    /// Waits until all of `bits` are clear, for at most `limit`.
    ///
    /// # Errors
    /// As [`Regs::wait_set`].
    pub fn wait_clear<R: Readable>(
        &self,
        register: R,
        bits: Bits<R>,
        limit: Duration,
    ) -> Result<(), WaitError> {
        self.wait(register, bits, 0, limit)
    }

    /// Waits until those of `register`'s bits that `bits` names are `wanted`.
    fn wait<R: Readable>(
        &self,
        register: R,
        bits: Bits<R>,
        wanted: u32,
        limit: Duration,
    ) -> Result<(), WaitError> {
        // Counted in pauses rather than read from a clock: a model may let its time pass faster.
        let step = (limit / 1000).clamp(Duration::from_micros(10), Duration::from_millis(1));
        let mut waited = Duration::ZERO;
        loop {
            let value = self.read(register);
            if value == GONE {
                return Err(WaitError::Gone { register: Name(register, 0).to_string() });
            }
            let got = value & bits.0;
            if got == wanted {
                return Ok(());
            }
            if waited >= limit {
                let register = Name(register, bits.0).to_string();
                return Err(WaitError::Timeout { register, wanted, got, waited });
            }
            self.0.pause(step);
            waited += step;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::sync::Mutex;

    registers! {
        /// One with fields.
        CONTROL @ 0x10 rw { 0 => RESET, 4..=7 => MODE, 25 => ENABLE }
        /// An array.
        QUEUE @ 0x100 + 0x40 * queue[2] rw { 25 => ENABLE }
    }

    /// Reads what it is told to, and counts the time that is let pass.
    struct Told(Mutex<Cell<(u32, Duration)>>);
    impl Bar for Told {
        fn read32(&self, _: u32) -> u32 {
            self.0.lock().unwrap().get().0
        }
        fn write32(&self, _: u32, value: u32) {
            let cell = self.0.lock().unwrap();
            cell.set((value, cell.get().1));
        }
        fn pause(&self, time: Duration) {
            let cell = self.0.lock().unwrap();
            cell.set((cell.get().0, cell.get().1 + time));
        }
    }

    fn told(value: u32) -> Regs<Told> {
        Regs::new(Told(Mutex::new(Cell::new((value, Duration::ZERO)))))
    }

    #[test]
    fn a_bit_that_never_comes_is_a_timeout_that_names_register_wanted_and_got() {
        let regs = told(0x30);
        let error = regs.wait_set(QUEUE(1), QUEUE::ENABLE, Duration::from_millis(10)).unwrap_err();
        assert_eq!(error.to_string(), "QUEUE[1].ENABLE: wanted 0x2000000, read 0x0 for 10ms");
        assert_eq!(regs.0.0.lock().unwrap().get().1, Duration::from_millis(10));
        let error = regs.wait_clear(CONTROL, CONTROL::MODE.is(0xf), Duration::ZERO).unwrap_err();
        assert_eq!(error.to_string(), "CONTROL.MODE: wanted 0x0, read 0x30 for 0ns");
    }

    #[test]
    fn a_register_that_reads_all_ones_ends_a_wait_at_once_even_where_ones_are_wanted() {
        let error = told(GONE).wait_set(CONTROL, CONTROL::RESET, Duration::from_secs(9)).unwrap_err();
        assert_eq!(error, WaitError::Gone { register: "CONTROL".into() });
    }

    #[test]
    fn fields_and_bits_change_nothing_beside_them() {
        let regs = told(0xff00_0000);
        regs.set(CONTROL, CONTROL::RESET | CONTROL::MODE.is(0x1f));
        assert_eq!(regs.read(CONTROL), 0xff00_00f1);
        regs.clear(CONTROL, CONTROL::ENABLE | CONTROL::RESET);
        assert_eq!(regs.read(CONTROL), 0xfd00_00f0);
        assert_eq!(CONTROL::MODE.of(regs.read(CONTROL)), 15);
        assert!(!CONTROL::ENABLE.are_in(0xfd00_00f0));
    }
}
