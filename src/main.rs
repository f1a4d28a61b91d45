//! The `cableway` command: arguments in, library call, report out.
//!
//! Exit status: 0 when all is well, 1 when something went wrong on the way, 2 when the arguments or a configuration are
//! wrong and nothing was started. `cableway vm` has three more for what became of its guest (`vm`).

mod bench;
mod confinement;
mod demo;
mod doctor;
mod image;
mod interrupt;
mod latency;
mod log;
mod nic;
mod node;
mod output;
mod ready;
mod switch;
mod top;
mod tune;
mod vm;
mod vnf;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// An NFV data-plane appliance: a vhost-user switch that copies each frame once, and virtual machines.
#[derive(Parser)]
#[command(name = "cableway", version, arg_required_else_help = true)]
struct Cableway {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::DemoArgs),
    /// Measures a switch: rates, loss and latency by frame size.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    Doctor(doctor::DoctorArgs),
    Image(image::ImageArgs),
    Latency(latency::LatencyArgs),
    #[command(subcommand)]
    Nic(nic::NicCommand),
    Up(node::UpArgs),
    Down(node::DownArgs),
    Status(node::StatusArgs),
    Switch(switch::SwitchArgs),
    Top(top::TopArgs),
    #[command(subcommand)]
    Tune(tune::TuneCommand),
    Vm(Box<vm::VmArgs>),
    #[command(subcommand)]
    Vnf(vnf::VnfCommand),
}

fn main() -> ExitCode {
    if let Err(error) = host::cpu::require_x86_64_v3() {
        eprintln!("cableway: {error}");
        return ExitCode::from(output::REFUSED);
    }
    let done = match Cableway::parse().command {
        Command::Demo(args) => demo::run(args),
        Command::Bench(command) => bench::run(command),
        Command::Doctor(args) => doctor::run(&args),
        Command::Image(args) => image::run(&args),
        Command::Latency(args) => latency::run(&args),
        Command::Nic(command) => nic::run(command),
        Command::Up(args) => node::up(&args),
        Command::Down(args) => node::down(&args),
        Command::Status(args) => node::status(&args),
        Command::Switch(args) => switch::run(args),
        Command::Top(args) => top::run(&args),
        Command::Tune(command) => tune::run(&command),
        Command::Vm(args) => vm::run(*args),
        Command::Vnf(command) => vnf::run(&command),
    };
    done.unwrap_or_else(|error| {
        eprintln!("cableway: {error:#}");
        ExitCode::FAILURE
    })
}
