//! The view as a screen, and what keys change of it. Draws; reads nothing.

use std::collections::VecDeque;

use ratatui::Frame;
use ratatui::crossterm::event::KeyCode;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style, Stylize};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Block, Clear, Paragraph, Row, Sparkline, Table};

use super::view::{MACHINE_HEADER, PORT_HEADER, Port, View, micros, percent};

/// How many past values the sparkline has.
const PAST: usize = 240;
const BAR: usize = 20;
const KEYS: &str = "F1 ? Help   F6 Sort   ↑↓ Scroll   Space Pause   F10 q Quit";
const HELP: &str = "Cores     time that the kernel saw something run (a worker that polls is
          always busy), steal by a hypervisor below, threads of ours
Worker    share of its cycles in which it moved frames
Waited    time that workers were ready to run and the kernel ran something
          else on their core, each second: delay that frames see
Ports     rates as the switch counts them: in is what came from the port
Machines  steal is time that vCPUs were ready and had to wait for a core;
          exits are those to `cableway vm`, with why: what KVM does by
          itself is not among them

F6 s  next order of the ports     ↑ ↓ PgUp PgDn Home End  ports and machines
Space Z  pause    F1 ? h  this page    F10 q Esc Ctrl-C  quit";

/// Order of the ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    File,
    Rate,
    Drops,
    Name,
}

/// What keys have changed, and what was seen before.
pub(super) struct Screen {
    sort: Sort,
    first: usize,
    pub(super) paused: bool,
    help: bool,
    waited: VecDeque<u64>,
}

impl Screen {
    pub(super) fn new() -> Self {
        Self { sort: Sort::File, first: 0, paused: false, help: false, waited: VecDeque::new() }
    }

    /// Remembers what the sparkline shows.
    pub(super) fn remember(&mut self, view: &View) {
        self.waited.push_back(view.waited_us() as u64);
        while self.waited.len() > PAST {
            self.waited.pop_front();
        }
    }

    /// Does what a key means; whether it ends the program.
    pub(super) fn key(&mut self, key: KeyCode) -> bool {
        match key {
            KeyCode::Esc if self.help => self.help = false,
            KeyCode::Char('q') | KeyCode::F(10) | KeyCode::Esc => return true,
            KeyCode::Char('?' | 'h') | KeyCode::F(1) => self.help = !self.help,
            KeyCode::Char(' ' | 'Z') => self.paused = !self.paused,
            KeyCode::Char('s') | KeyCode::F(6) => {
                self.sort = match self.sort {
                    Sort::File => Sort::Rate,
                    Sort::Rate => Sort::Drops,
                    Sort::Drops => Sort::Name,
                    Sort::Name => Sort::File,
                };
            }
            KeyCode::Up => self.first = self.first.saturating_sub(1),
            KeyCode::Down => self.first = self.first.saturating_add(1),
            KeyCode::PageUp => self.first = self.first.saturating_sub(10),
            KeyCode::PageDown => self.first = self.first.saturating_add(10),
            KeyCode::Home => self.first = 0,
            KeyCode::End => self.first = usize::MAX,
            _ => {}
        }
        false
    }

    /// Draws the view.
    pub(super) fn draw(&mut self, frame: &mut Frame<'_>, view: &View) {
        // Nobody scrolls out of what there is.
        self.first = self.first.min(view.ports.len().max(view.machines.len()).saturating_sub(1));
        let share = |rows: usize| u16::try_from(rows + 1).unwrap_or(u16::MAX);
        let machines = share(view.machines.len().max(1)).min(frame.area().height / 4);
        let cores = share(view.cores.len()).min(frame.area().height / 3);
        let workers = share(view.workers.len().min(8));
        let [title, core_area, worker_area, spark, port_area, machine_area, keys] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(cores),
            Constraint::Length(workers),
            Constraint::Length(3),
            Constraint::Min(3),
            Constraint::Length(machines.max(2)),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        let paused = if self.paused { "  PAUSED" } else { "" };
        let of = view.switch.as_deref().or(view.switch_absent.as_deref()).unwrap_or("no switch");
        frame.render_widget(Line::from(format!("cableway top  {of}{paused}")).bold(), title);
        draw_cores(frame, view, core_area);

        let header = Row::new(["worker", "busy", "frames", "waited for its core"]).style(header_style());
        let rows = view.workers.iter().map(|worker| Row::new(worker.cells()));
        let widths = [12, 8, 12, 20].map(Constraint::Length);
        frame.render_widget(Table::new(rows, widths).header(header), worker_area);

        let [label, line] = Layout::vertical([Constraint::Length(1), Constraint::Min(1)]).areas(spark);
        let most = self.waited.iter().max().copied().unwrap_or(0);
        let (now, most) = (micros(view.waited_us()), micros(most as f64));
        let text =
            format!("latency: workers waited for their cores {now} of the last second, at most {most}");
        frame.render_widget(Line::from(text).style(header_style()), label);
        let wide = usize::from(line.width);
        let shown: Vec<u64> = self.waited.iter().rev().take(wide).rev().copied().collect();
        frame.render_widget(Sparkline::default().data(&shown), line);

        let order = format!("port by {:?}", self.sort).to_lowercase();
        let mut titles = PORT_HEADER;
        titles[0] = &order;
        let header = Row::new(titles).style(header_style());
        let rows = self.sorted(&view.ports).into_iter().skip(self.first).map(|port| Row::new(port.cells()));
        let widths =
            [16, 10, 10, 12, 10, 12, 9].map(Constraint::Length).into_iter().chain([Constraint::Min(10)]);
        frame.render_widget(Table::new(rows, widths).header(header), port_area);

        if view.machines.is_empty() {
            frame.render_widget(Paragraph::new("no virtual machine of ours runs"), machine_area);
        } else {
            let header = Row::new(MACHINE_HEADER).style(header_style());
            let rows = view.machines.iter().skip(self.first).map(|machine| Row::new(machine.cells()));
            let widths =
                [16, 13, 8, 6, 7, 7, 10].map(Constraint::Length).into_iter().chain([Constraint::Min(10)]);
            frame.render_widget(Table::new(rows, widths).header(header), machine_area);
        }
        frame.render_widget(Line::from(KEYS).style(header_style()), keys);
        if self.help {
            let area = frame.area().inner(ratatui::layout::Margin::new(2, 1));
            frame.render_widget(Clear, area);
            frame.render_widget(
                Paragraph::new(Text::from(HELP)).block(Block::bordered().title(" help ")),
                area,
            );
        }
    }

    fn sorted<'v>(&self, ports: &'v [Port]) -> Vec<&'v Port> {
        let mut ports: Vec<_> = ports.iter().collect();
        match self.sort {
            Sort::File => {}
            Sort::Rate => ports.sort_by(|a, b| (b.in_pps + b.out_pps).total_cmp(&(a.in_pps + a.out_pps))),
            Sort::Drops => ports.sort_by(|a, b| b.dropped_pps.total_cmp(&a.dropped_pps)),
            Sort::Name => ports.sort_by(|a, b| a.name.cmp(&b.name)),
        }
        ports
    }
}

fn draw_cores(frame: &mut Frame<'_>, view: &View, area: Rect) {
    let header = Row::new(["core", "busy", "", "steal", "runs"]).style(header_style());
    let rows = view.cores.iter().map(|core| {
        let full = ((core.busy / 100.0 * BAR as f64).round() as usize).min(BAR);
        let bar = format!("[{}{}]", "|".repeat(full), " ".repeat(BAR - full));
        Row::new([core.core.to_string(), bar, percent(core.busy), percent(core.steal), core.runs_text()])
    });
    let widths = [4, BAR as u16 + 2, 6, 6].map(Constraint::Length).into_iter().chain([Constraint::Min(10)]);
    frame.render_widget(Table::new(rows, widths).header(header), area);
}

fn header_style() -> Style {
    Style::new().add_modifier(Modifier::REVERSED)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::view::{Core, Machine, Runs, Worker};
    use super::*;

    fn port(name: &str, in_pps: f64, dropped: f64) -> Port {
        Port {
            name: name.to_owned(),
            state: "up".to_owned(),
            in_pps,
            in_bps: in_pps * 512.0,
            out_pps: 0.0,
            out_bps: 0.0,
            dropped_pps: dropped,
            drops: BTreeMap::from([("receiver_full".to_owned(), dropped)]),
        }
    }

    fn view() -> View {
        let runs = vec![Runs { process: "switch".to_owned(), thread: "worker-1".to_owned(), busy: 99.0 }];
        View {
            seconds: 1.0,
            switch: Some("/etc/vv.toml".to_owned()),
            switch_absent: None,
            cores: vec![Core { core: 1, busy: 50.0, steal: 3.0, runs }],
            workers: vec![Worker {
                core: 1,
                busy: Some(42.0),
                frames_per_s: 2e6,
                waited_us_per_s: Some(700.0),
            }],
            ports: vec![port("b", 1e6, 0.0), port("a", 1e3, 9.0)],
            machines: vec![Machine {
                name: "fw".to_owned(),
                pid: 77,
                state: Some("running".to_owned()),
                vcpus: 2,
                busy: 120.0,
                steal: 4.0,
                exits_per_s: Some(1_500.0),
                exits: BTreeMap::from([("halt".to_owned(), 1.0), ("mmio_write".to_owned(), 1_499.0)]),
            }],
        }
    }

    fn drawn(screen: &mut Screen, view: &View, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| screen.draw(frame, view)).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..height).map(|y| line(y) + "\n").collect()
    }

    #[test]
    fn everything_that_happens_is_on_the_screen() {
        let mut screen = Screen::new();
        screen.remember(&view());
        let text = drawn(&mut screen, &view(), 120, 30);
        for wanted in [
            "/etc/vv.toml",
            "[||||||||||          ]",
            "switch/worker-1 99 %",
            "42 %",
            "700 µs of the last second",
            "█",
            "1 Mpps",
            "receiver_full 9 pps",
            "fw               running       77",
            "mmio_write 1.5 k/s, halt 1 /s",
            "F10 q Quit",
        ] {
            assert!(text.contains(wanted), "{wanted} is not in\n{text}");
        }
    }

    #[test]
    fn keys_sort_scroll_pause_help_and_quit() {
        let mut screen = Screen::new();
        let order = |screen: &mut Screen| {
            let text = drawn(screen, &view(), 120, 30);
            text.find("a                up") < text.find("b                up")
        };
        assert!(!order(&mut screen));
        let mut orders = Vec::new();
        for _ in 0..4 {
            assert!(!screen.key(KeyCode::F(6)));
            orders.push(order(&mut screen));
        }
        assert_eq!(orders, [false, true, true, false], "by rate, drops, name, file");
        for _ in 0..9 {
            screen.key(KeyCode::Down);
        }
        assert!(!drawn(&mut screen, &view(), 120, 30).contains("b                up"));
        assert!(drawn(&mut screen, &view(), 120, 30).contains("a                up"));
        screen.key(KeyCode::Char(' '));
        assert!(screen.paused && drawn(&mut screen, &view(), 120, 30).contains("PAUSED"));
        screen.key(KeyCode::Char('?'));
        assert!(drawn(&mut screen, &view(), 120, 30).contains("next order of the ports"));
        assert!(!screen.key(KeyCode::Esc), "closes the help only");
        assert!(screen.key(KeyCode::Char('q')) && screen.key(KeyCode::F(10)) && screen.key(KeyCode::Esc));
    }

    #[test]
    fn nothing_to_show_and_a_terminal_of_any_size_are_no_trouble() {
        let absent = View { switch_absent: Some("no switch is running".to_owned()), ..View::default() };
        let text = drawn(&mut Screen::new(), &absent, 100, 24);
        assert!(text.contains("no switch is running") && text.contains("no virtual machine"), "{text}");
        for width in [1, 2, 7, 30] {
            for height in [1, 2, 5, 12] {
                drawn(&mut Screen::new(), &view(), width, height);
                drawn(&mut Screen::new(), &absent, width, height);
            }
        }
    }
}
