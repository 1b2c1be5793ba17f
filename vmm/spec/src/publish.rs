//! Ports of the host that lead to ports of a guest.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize, Serializer};

/// Whoever connects to the host's port reaches the guest's. Written as `[ADDRESS:]HOST:GUEST[/udp]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Publish {
    /// The host's address: by default that of the host alone, 127.0.0.1.
    pub address: IpAddr,
    /// The port of the host.
    pub host: u16,
    /// The port of the guest.
    pub guest: u16,
    /// Whether the port is one of UDP and not of TCP.
    pub udp: bool,
}

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

impl FromStr for Publish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} publishes no port; write HOST:GUEST as in 2222:22, with ADDRESS: before it or /udp behind it"
            )
        };
        let (ports, udp) = match text.rsplit_once('/') {
            None => (text, false),
            Some((ports, "tcp")) => (ports, false),
            Some((ports, "udp")) => (ports, true),
            Some(_) => return Err(wrong()),
        };
        let (rest, guest) = ports.rsplit_once(':').ok_or_else(wrong)?;
        let (address, host) = match rest.rsplit_once(':') {
            None => (LOCAL, rest),
            Some((address, host)) => {
                // An IPv6 address has colons, and may stand in brackets.
                let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
                (bare.unwrap_or(address).parse().map_err(|_| wrong())?, host)
            }
        };
        let port = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse().ok().filter(|port| digits && *port > 0).ok_or_else(wrong)
        };
        Ok(Self { address, host: port(host)?, guest: port(guest)?, udp })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            LOCAL => {}
            IpAddr::V4(address) => write!(f, "{address}:")?,
            IpAddr::V6(address) => write!(f, "[{address}]:")?,
        }
        write!(f, "{}:{}{}", self.host, self.guest, if self.udp { "/udp" } else { "" })
    }
}

impl Serialize for Publish {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Publish {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'_, str>::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(feature = "schema")]
mod schema {
    use std::borrow::Cow;

    use utoipa::openapi::RefOr;
    use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
    use utoipa::{PartialSchema, ToSchema};

    use super::Publish;

    impl PartialSchema for Publish {
        fn schema() -> RefOr<Schema> {
            let text = ObjectBuilder::new().schema_type(Type::String);
            let text = text.description(Some(
                "A port of the host that leads to a port of the guest: `[ADDRESS:]HOST:GUEST[/udp]`. The address is \
                 127.0.0.1 by default",
            ));
            // Addresses and numbers in range are checked when the text is read.
            let port = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3})";
            let text = text.pattern(Some(format!("^{port}:{port}(/(tcp|udp))?$")));
            Schema::Object(text.examples(["2222:22"]).build()).into()
        }
    }

    impl ToSchema for Publish {
        fn name() -> Cow<'static, str> {
            "PublishSpec".into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_and_written() {
        let publish = |text: &str| text.parse::<Publish>().unwrap();
        let plain = Publish { address: LOCAL, host: 2222, guest: 22, udp: false };
        assert_eq!(publish("2222:22"), plain);
        assert_eq!(publish("127.0.0.1:2222:22/tcp"), plain);
        assert_eq!(publish("0.0.0.0:53:53/udp").to_string(), "0.0.0.0:53:53/udp");
        assert_eq!(publish("[::1]:80:8080"), publish("::1:80:8080"));
        assert_eq!(serde_json::to_string(&publish("::1:80:8080")).unwrap(), "\"[::1]:80:8080\"");
        assert_eq!(serde_json::from_str::<Publish>("\"2222:22\"").unwrap(), plain);
        for wrong in
            ["", "22", "0:22", "22:0", "22:65536", "+22:22", "a:22:22", "22:22/sctp", "22:22/", ":22:22"]
        {
            assert!(wrong.parse::<Publish>().is_err(), "{wrong}");
        }
    }
}
