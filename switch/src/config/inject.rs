//! `inject = { … }`: the faults that a port's frames suffer on purpose.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer, Unexpected, Visitor};
use settings::{Problems, Spanned};

use super::keys::InjectKeys;
use super::validate::value_or;
use super::values::Direction;

/// Faults on purpose. With the same seed the same frames suffer, counted on each queue and in each direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inject {
    /// What the faults are drawn from.
    pub seed: u64,
    /// Frames that are lost.
    pub drop: Share,
    /// Frames of which one bit is turned round.
    pub corrupt: Share,
    /// Frames that come twice.
    pub duplicate: Share,
    /// Frames that come later than some that were sent after them.
    pub reorder: Share,
    /// How long each frame takes.
    pub delay: Duration,
    /// Which frames suffer.
    pub direction: Direction,
}

impl Default for Inject {
    fn default() -> Self {
        let none = Share::default();
        Self {
            seed: 1,
            drop: none,
            corrupt: none,
            duplicate: none,
            reorder: none,
            delay: Duration::ZERO,
            direction: Direction::Both,
        }
    }
}

impl fmt::Display for Inject {
    /// As it would be written.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed = {}", self.seed)?;
        let shares = [
            ("drop", self.drop),
            ("corrupt", self.corrupt),
            ("duplicate", self.duplicate),
            ("reorder", self.reorder),
        ];
        for (key, share) in shares.into_iter().filter(|(_, share)| *share != Share::default()) {
            write!(f, ", {key} = {share}")?;
        }
        if !self.delay.is_zero() {
            write!(f, ", delay_us = {}", self.delay.as_micros())?;
        }
        if self.direction != Direction::Both {
            write!(f, ", direction = \"{}\"", self.direction.word())?;
        }
        Ok(())
    }
}

/// What the keys mean, and whether they mean anything.
pub(super) fn read(place: &str, keys: Spanned<InjectKeys>, problems: &mut Problems<'_>) -> Inject {
    let (span, keys) = (keys.span(), keys.into_inner());
    let mistaken = keys.wrong.any();
    let inject = Inject {
        seed: keys.seed.map_or(1, |seed| seed.into_inner().get()),
        drop: value_or(keys.drop, Share::default()),
        corrupt: value_or(keys.corrupt, Share::default()),
        duplicate: value_or(keys.duplicate, Share::default()),
        reorder: value_or(keys.reorder, Share::default()),
        delay: keys.delay_us.map_or(Duration::ZERO, |us| Duration::from_micros(us.into_inner().get())),
        direction: value_or(keys.direction, Direction::Both),
    };
    let idle = Inject { seed: inject.seed, direction: inject.direction, ..Inject::default() };
    if inject == idle && !mistaken {
        let message = "`inject` says nothing that should happen: give a rate in percent, as in `inject = { drop = 1 }`, \
                       or a `delay_us`, or take it out";
        problems.add(span, format!("{place}{message}"));
    }
    inject
}

/// A share of frames, in millionths; written in percent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share(u32);

impl Share {
    const ALL: u32 = 1_000_000;

    /// So many of a million frames.
    pub fn of_millionths(millionths: u32) -> Self {
        Self(millionths.min(Self::ALL))
    }

    /// Whether a frame that drew `number` is one of them, when each number is as likely.
    pub(crate) fn holds(self, number: u32) -> bool {
        (u64::from(number) * u64::from(Self::ALL)) >> 32 < u64::from(self.0)
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", f64::from(self.0) / 10_000.0)
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Percent;
        impl Visitor<'_> for Percent {
            type Value = Share;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a share in percent, from 0 to 100, in steps of 0.0001")
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Share, E> {
                match u32::try_from(value) {
                    Ok(percent @ 0..=100) => Ok(Share(percent * 10_000)),
                    _ => Err(E::invalid_value(Unexpected::Signed(value), &self)),
                }
            }

            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Share, E> {
                let millionths = value * 10_000.0;
                if !(0.0..=100.0).contains(&value) || (millionths - millionths.round()).abs() > 1e-6 {
                    return Err(E::invalid_value(Unexpected::Float(value), &self));
                }
                Ok(Share(millionths.round() as u32))
            }
        }
        deserializer.deserialize_any(Percent)
    }
}
