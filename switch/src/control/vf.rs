//! What a client may change of a virtual function.

use serde::Deserialize;
use settings::values::HardwareAddress;
use utoipa::IntoParams;

use crate::config::VirtualFunction;

/// What is to change; what is left out stays. Names are those of ip-link(8).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct VfChange {
    /// Its address: six hexadecimal bytes.
    pub mac: Option<String>,
    /// Its VLAN, 1 to 4094; 0: none.
    pub vlan: Option<u16>,
    /// The priority of what it sends in its VLAN, 0 to 7.
    pub qos: Option<u8>,
    /// Whether it may change its address and receive all groups.
    pub trust: Option<bool>,
    /// Whether what it sends must come from its own address.
    pub spoof_check: Option<bool>,
}

impl VfChange {
    /// Does it.
    ///
    /// # Errors
    /// A value makes no sense; for the user.
    pub fn apply(&self, function: &mut VirtualFunction) -> Result<(), String> {
        if let Some(mac) = &self.mac {
            function.mac = Some(mac.parse::<HardwareAddress>()?.0);
        }
        match self.vlan {
            None => {}
            Some(0) => (function.vlan, function.qos) = (None, 0),
            Some(vlan @ 1..=4_094) => function.vlan = Some(vlan),
            Some(vlan) => return Err(format!("VLAN {vlan}: wanted 1 to 4094, or 0 for none")),
        }
        match self.qos {
            None => {}
            Some(0..=7) if function.vlan.is_none() => {
                return Err("`qos` goes with a VLAN: give one".to_owned());
            }
            Some(qos @ 0..=7) => function.qos = qos,
            Some(qos) => return Err(format!("priority {qos}: wanted 0 to 7")),
        }
        function.trust = self.trust.unwrap_or(function.trust);
        function.spoof_check = self.spoof_check.unwrap_or(function.spoof_check);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_stays_and_what_makes_no_sense_is_refused_with_what_would() {
        let mut function = VirtualFunction { trust: true, ..VirtualFunction::default() };
        let vlan = VfChange { vlan: Some(20), qos: Some(3), ..VfChange::default() };
        vlan.apply(&mut function).unwrap();
        let mac = VfChange {
            mac: Some("02:00:00:00:00:07".into()),
            spoof_check: Some(false),
            ..VfChange::default()
        };
        mac.apply(&mut function).unwrap();
        let wanted = VirtualFunction {
            mac: Some([2, 0, 0, 0, 0, 7]),
            vlan: Some(20),
            qos: 3,
            trust: true,
            spoof_check: false,
        };
        assert_eq!(function, wanted);
        VfChange { vlan: Some(0), ..VfChange::default() }.apply(&mut function).unwrap();
        assert_eq!((function.vlan, function.qos), (None, 0));
        let refused = [
            (VfChange { mac: Some("01:00:00:00:00:07".into()), ..VfChange::default() }, "group address"),
            (VfChange { mac: Some("x".into()), ..VfChange::default() }, "six hexadecimal bytes"),
            (VfChange { vlan: Some(4095), ..VfChange::default() }, "1 to 4094"),
            (VfChange { qos: Some(1), ..VfChange::default() }, "goes with a VLAN"),
            (VfChange { vlan: Some(1), qos: Some(8), ..VfChange::default() }, "0 to 7"),
        ];
        for (change, why) in refused {
            let error = change.apply(&mut function).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
