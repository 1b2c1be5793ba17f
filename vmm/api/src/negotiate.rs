//! Chooses the text format of metrics that a client wants (RFC 9110, section 12.5.1).

use axum::http::HeaderMap;
use axum::http::header::ACCEPT;

/// A text format of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TextFormat {
    /// OpenMetrics 1.0.0.
    OpenMetrics,
    /// Prometheus' own format, 0.0.4.
    Prometheus,
}

impl TextFormat {
    /// Returns the media type.
    pub(super) fn media_type(self) -> &'static str {
        match self {
            TextFormat::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            TextFormat::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    fn versions(self) -> (&'static str, &'static [&'static str]) {
        match self {
            // The text uses nothing that differs from the draft 0.0.1.
            TextFormat::OpenMetrics => ("application/openmetrics-text", &["1.0.0", "0.0.1"]),
            TextFormat::Prometheus => ("text/plain", &["0.0.4"]),
        }
    }

    /// Returns the format that the headers of a request prefer, and OpenMetrics if they prefer none.
    pub(super) fn preferred(headers: &HeaderMap) -> Self {
        let accepted: Vec<&str> =
            headers.get_all(ACCEPT).iter().filter_map(|accept| accept.to_str().ok()).collect();
        let accepted = accepted.join(",");
        let [openmetrics, prometheus] =
            [TextFormat::OpenMetrics, TextFormat::Prometheus].map(|format| format.quality(&accepted));
        if prometheus > openmetrics { TextFormat::Prometheus } else { TextFormat::OpenMetrics }
    }

    /// Returns the preference for the format, from 0 to 1: that of the range that matches it most closely.
    fn quality(self, accepted: &str) -> f64 {
        let (own, versions) = self.versions();
        let own_kind = own.split('/').next().unwrap_or_default();
        let mut best = (0, 0.0);
        for range in accepted.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default().to_ascii_lowercase();
            let closeness = match media.as_str() {
                "*/*" => 1,
                media if media.strip_suffix("/*") == Some(own_kind) => 2,
                media if media == own => 3,
                _ => continue,
            };
            let mut quality = 1.0;
            let mut fits = true;
            let mut versioned = false;
            for parameter in parts {
                let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
                let value = value.trim().trim_matches('"');
                match name.trim().to_ascii_lowercase().as_str() {
                    "q" => quality = value.parse::<f64>().unwrap_or(0.0).clamp(0.0, 1.0),
                    "version" => {
                        versioned = true;
                        fits &= versions.contains(&value);
                    }
                    "charset" => fits &= value.eq_ignore_ascii_case("utf-8"),
                    _ => {}
                }
            }
            let closeness = closeness + i32::from(versioned);
            if fits && (closeness > best.0 || (closeness == best.0 && quality > best.1)) {
                best = (closeness, quality);
            }
        }
        best.1
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn preferred(accept: &[&'static str]) -> TextFormat {
        let mut headers = HeaderMap::new();
        for accept in accept {
            headers.append(ACCEPT, HeaderValue::from_static(accept));
        }
        TextFormat::preferred(&headers)
    }

    #[test]
    fn prometheus_own_format_is_for_who_prefers_it() {
        for accept in [
            "text/plain",
            "TEXT/Plain; Version=0.0.4",
            "text/*",
            "text/plain;version=\"0.0.4\";q=0.5,*/*;q=0.1",
            "application/openmetrics-text;q=0.2, text/plain;q=0.3",
            "text/plain; charset=utf-8, */*;q=0.8",
            "application/openmetrics-text;q=0, */*",
            "application/openmetrics-text; version=2.0.0, text/plain",
        ] {
            assert_eq!(preferred(&[accept]), TextFormat::Prometheus, "{accept}");
        }
        assert_eq!(preferred(&["text/plain", "*/*;q=0.1"]), TextFormat::Prometheus);
    }

    #[test]
    fn openmetrics_is_for_all_others() {
        for accept in [
            // As Prometheus 2 and 3 ask.
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
             text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
             application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,\
             text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
            "*/*",
            "",
            "text/html,application/xhtml+xml,*/*;q=0.8",
            "application/json",
            "text/plain;version=9",
            "text/plain;q=0",
            "text/plain;q=none",
            "text/plain, application/openmetrics-text",
        ] {
            assert_eq!(preferred(&[accept]), TextFormat::OpenMetrics, "{accept}");
        }
        assert_eq!(preferred(&[]), TextFormat::OpenMetrics);
    }
}
