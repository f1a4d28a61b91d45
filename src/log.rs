//! What a long-running command logs, and where: to standard error, as much as asked; to the journal with its priorities.

use std::io::IsTerminal;

use anyhow::{Context, Result};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{self, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Logs to standard error.
///
/// # Errors
/// The filter is none.
pub(crate) fn start(filter: Option<&str>) -> Result<()> {
    let filter = match filter {
        Some(filter) => EnvFilter::try_new(filter).with_context(|| format!("--log {filter}"))?,
        None => EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")),
    };
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let form = format::format().compact().with_target(false);
    if host::program::is_journal(std::io::stderr()) {
        lines.with_ansi(false).event_format(Prioritized(form.without_time())).init();
    } else {
        let ansi = std::io::stderr().is_terminal();
        lines.with_ansi(ansi).event_format(form.with_ansi(ansi)).init();
    }
    Ok(())
}

/// Lines that the journal files by priority (sd-daemon(3)); it knows the time itself.
struct Prioritized<F>(F);

impl<S, N, F> FormatEvent<S, N> for Prioritized<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        write!(writer, "<{priority}>")?;
        self.0.format_event(context, writer, event)
    }
}
