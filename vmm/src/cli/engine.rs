//! `--sharing-engine`: how the engine works, for comparisons.

use samepage_sharing::claims::SharedTypes;
use samepage_sharing::engine::Order;

/// `--sharing-engine`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EngineArg {
    pub(crate) lookahead: bool,
    pub(crate) order: Order,
    pub(crate) follow: bool,
    pub(crate) types: SharedTypes,
}

pub(super) fn parse_engine(text: &str) -> Result<EngineArg, String> {
    let mut engine =
        EngineArg { lookahead: true, order: Order::Digest, follow: true, types: SharedTypes::All };
    for field in text.split(',').filter(|field| !field.is_empty()) {
        match field {
            "lookahead=on" => engine.lookahead = true,
            "lookahead=off" => engine.lookahead = false,
            "order=digest" => engine.order = Order::Digest,
            "order=content" => engine.order = Order::Content,
            "scan=changes" => engine.follow = true,
            "scan=full" => engine.follow = false,
            "types=all" => engine.types = SharedTypes::All,
            "types=not-file" => engine.types = SharedTypes::NotFile,
            "types=file" => engine.types = SharedTypes::File,
            _ => {
                return Err(format!(
                    "unknown field {field:?}; fields are lookahead=on|off, order=digest|content, \
                     scan=changes|full and types=all|not-file|file"
                ));
            }
        }
    }
    Ok(engine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engine_can_be_made_to_work_as_ksm_does() {
        assert_eq!(
            parse_engine("lookahead=off,order=content,scan=full,types=file"),
            Ok(EngineArg {
                lookahead: false,
                order: Order::Content,
                follow: false,
                types: SharedTypes::File
            })
        );
        assert_eq!(parse_engine(""), parse_engine("lookahead=on,order=digest,scan=changes,types=all"));
        assert!(parse_engine("lookahead").is_err() && parse_engine("order=random").is_err());
    }
}
