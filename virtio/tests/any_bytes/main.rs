//! Rings of any bytes: no panic, no access outside the memory, bounded work. The same code is fuzzed by `fuzz/`.

mod harness;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn a_device_survives_whatever_its_driver_writes(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        harness::device(&bytes);
    }

    #[test]
    fn a_driver_survives_whatever_its_device_writes(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        harness::driver(&bytes);
    }
}
