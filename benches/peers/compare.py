#!/usr/bin/env python3
"""Compares switches with two vhost-user ports in one run: DPDK's testpmd, OVS-DPDK and ours, by the same generators.

  compare.py                                      testpmd, OVS-DPDK and configs/vv.toml, 64 bytes, split rings
  compare.py --sizes 64,1500 --ring packed ovs cableway
  compare.py ovs 'cmd:my-switch --dir {dir}'      any program that serves {dir}/v0.sock and {dir}/v1.sock
  compare.py --generator testpmd ...              DPDK's testpmd alone as generator, without `cableway bench vv`

Two generators, `cableway bench vv` and DPDK's testpmd, measure every switch, so that nobody measures with his own ruler only.
The switches are measured in turn, round after round, and compared as ratios of medians to the first: absolute figures move
with the machine, ratios within a run much less. The generator is on one core (--cores, first), each switch polls on the
other. `testpmd` forwards between two ports without any switching: a bound for DPDK's vhost library.

A switch or generator that does not do its part is told with its reason and counts as 0 Mpps; the others are measured on.
Exit status: 0; 1 if a switch delivered nothing or lost frames; 2 if something is missing (it says what to install).
"""
import argparse
import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OVS_DAEMON = '/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk'
OVS_SCHEMA = '/usr/share/openvswitch/vswitch.ovsschema'
HUGE_PAGES = pathlib.Path('/sys/kernel/mm/hugepages/hugepages-2048kB')
HUGE_PAGES_NEEDED = 640       # 512 MiB for the switch, 512 MiB for the generator, and some
TESTPMD_BURST = 32            # frames in each of the bursts that `start tx_first N` sends


class Missing(Exception):
    """Something that the user can install or set up."""


class Broken(Exception):
    """A switch or generator that does not do its part."""


def wait_for(what, seconds, condition, process=None):
    """Polls until `condition` holds; complains with the process's end or the time."""
    end = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise Broken(f'{what}: it ended with status {process.returncode}')
        if time.monotonic() > end:
            raise Broken(f'{what}: not within {seconds} s')
        time.sleep(0.02)


def end(process, seconds=10):
    """SIGTERM, and SIGKILL if that is not enough."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Testpmd:
    """An interactive testpmd: lines go in, text up to the next prompt comes out."""

    PROMPT = 'testpmd>'

    def __init__(self, folder, name, cores, vdevs, options):
        self.log = folder / f'{name}.log'
        lcores = ','.join(f'{lcore}@{core}' for lcore, core in enumerate(cores))
        # Without stdbuf its answers would stay in its buffer: only the prompt is written at once.
        command = ['stdbuf', '-oL', 'dpdk-testpmd', '--lcores', lcores, '--no-pci', '--in-memory', '--single-file-segments',
                   '-m', '512', '--file-prefix', f'compare-{name}']
        for vdev in vdevs:
            command += ['--vdev', vdev]
        command += ['--', '--interactive', '--nb-cores=1', '--no-flush-rx', '--total-num-mbufs=32768', *options]
        with open(self.log, 'w') as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                                            text=True, bufsize=1)
        self.seen = 0
        try:
            self.answer(60)
        except BaseException:
            end(self.process)
            raise

    def answer(self, seconds=20):
        """What it wrote since the last question, up to its prompt."""
        text = ''

        def prompted():
            nonlocal text
            text = self.log.read_text(errors='replace')
            return text[self.seen:].rstrip().endswith(self.PROMPT)
        try:
            wait_for('testpmd', seconds, prompted, self.process)
        except Broken as why:
            raise Broken(f'{why}\n{text[-1500:]}') from None
        new, self.seen = text[self.seen:], len(text)
        return new

    def ask(self, line):
        try:
            self.process.stdin.write(line + '\n')
        except OSError:
            raise Broken(f'testpmd: it ended\n{self.log.read_text(errors="replace")[-1500:]}') from None
        return self.answer()

    def counters(self):
        """Received and sent frames by port."""
        text = self.ask('show port stats all')
        found = re.findall(r'statistics for port (\d+).*?RX-packets: (\d+).*?TX-packets: (\d+)', text, re.DOTALL)
        if len(found) != 2:
            raise Broken(f'testpmd: these are not the counters of two ports:\n{text[-1500:]}')
        return {int(port): (int(received), int(sent)) for port, received, sent in found}

    def stop(self):
        with contextlib.suppress(OSError):
            self.process.stdin.write('stop\nquit\n')
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            end(self.process)


# The switches. Each is made with a folder and a core, serves or connects to v0.sock and v1.sock there, and can be stopped.

class TestpmdSwitch:
    """DPDK's vhost library moving buffers between two ports."""
    connects = False

    def __init__(self, folder, _size, args):
        vdevs = [f'net_vhost{i},iface={folder}/v{i}.sock,queues=1' for i in (0, 1)]
        options = ['--forward-mode=io', f'--rxd={args.queue_size}', f'--txd={args.queue_size}']
        self.pmd = Testpmd(folder, 'switch', args.cores, vdevs, options)
        self.pmd.ask('start')

    def stop(self):
        self.pmd.stop()


class Ovs:
    """OVS-DPDK: one bridge, its NORMAL action (MAC learning). It connects to the generator's sockets."""
    connects = True

    def __init__(self, folder, size, args):
        self.dir = folder / 'ovs'
        self.dir.mkdir()
        self.environment = dict(os.environ, OVS_RUNDIR=str(self.dir), OVS_LOGDIR=str(self.dir), OVS_DBDIR=str(self.dir))
        self.processes = []
        try:
            self.start(folder, size, args)
        except BaseException:
            self.stop()
            raise

    def start(self, folder, size, args):
        housekeeping, worker = (1 << core for core in args.cores)
        database = f'unix:{self.dir}/db.sock'
        self.run('ovsdb-tool', 'create', f'{self.dir}/conf.db', OVS_SCHEMA)
        self.spawn('ovsdb-server', f'--remote=punix:{self.dir}/db.sock', f'{self.dir}/conf.db')
        wait_for('ovsdb-server', 10, (self.dir / 'db.sock').exists, self.processes[-1])
        self.vsctl = ['ovs-vsctl', f'--db={database}', '--timeout=30']
        self.run(*self.vsctl, '--no-wait', 'init')
        self.run(*self.vsctl, '--no-wait', 'set', 'Open_vSwitch', '.', 'other_config:dpdk-init=true',
                 f'other_config:dpdk-lcore-mask={housekeeping:#x}', f'other_config:pmd-cpu-mask={worker:#x}',
                 'other_config:dpdk-socket-mem=512', 'other_config:dpdk-extra=--no-pci --in-memory')
        self.spawn(OVS_DAEMON, database)
        self.run(*self.vsctl, 'add-br', 'br0', '--', 'set', 'bridge', 'br0', 'datapath_type=netdev')
        mtu = [f'mtu_request={size - 14}'] if size > 1514 else []
        for i in (0, 1):
            self.run(*self.vsctl, 'add-port', 'br0', f'v{i}', '--', 'set', 'Interface', f'v{i}',
                     'type=dpdkvhostuserclient', f'options:vhost-server-path={folder}/v{i}.sock', *mtu)

    def run(self, *command):
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise Broken(f'{command[0]}: {done.stderr.strip()}')

    def spawn(self, *command):
        log = open(self.dir / f'{os.path.basename(command[0])}.log', 'w')
        with log:
            self.processes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def stop(self):
        for process in reversed(self.processes):
            end(process)


class Program:
    """A program that serves both sockets."""
    connects = False

    def __init__(self, folder, command):
        self.log = folder / 'switch.log'
        with open(self.log, 'w') as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(command[0], 10, lambda: all((folder / f'v{i}.sock').exists() for i in (0, 1)), self.process)
        except Broken as why:
            end(self.process)
            raise Broken(f'{why}\n{self.log.read_text()[-1500:]}') from None

    def stop(self):
        end(self.process)


def switch(name, folder, size, args):
    """Starts the switch of this name, for frames of this size."""
    if name == 'testpmd':
        return TestpmdSwitch(folder, size, args)
    if name == 'ovs':
        return Ovs(folder, size, args)
    if name == 'cableway':
        return Program(folder, [args.cableway, 'switch', args.config, '--run-dir', str(folder)])
    return Program(folder, shlex.split(name.removeprefix('cmd:').replace('{dir}', str(folder))))


# The generators. Each returns, for a switch that runs, the rate in Mpps and the frames lost.

def by_cableway(folder, connects, size, args):
    command = [args.cableway, 'bench', 'vv', '--quick', '--json', '--socket', f'{folder}/v0.sock', '--socket',
               f'{folder}/v1.sock', '--sizes', str(size), '--ring', args.ring, '--queue-size', str(args.queue_size),
               '--seconds', str(args.seconds), '--in-flight', str(args.in_flight), '--core', str(args.cores[0]),
               '--addresses', str(args.addresses)]
    command += ['--listen'] if connects else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=args.seconds + 60)
    try:
        told = json.loads(done.stdout)
    except ValueError:
        raise Broken(f'cableway bench vv: {done.stderr.strip()[-1500:]}') from None
    if not told['results']:
        raise Broken(told['ended'])
    loop = told['results'][0]['closed_loop']
    return {'mpps': loop['rate']['mpps'], 'lost': loop['lost'] + loop['corrupt'],
            'generator_busy': loop['generator_busy']}


def by_testpmd(folder, connects, size, args):
    """Both ports send each other what they received: a closed loop of as many frames as were sent first."""
    ring = ',packed_vq=1' if args.ring == 'packed' else ''
    server = ',server=1' if connects else ''
    vdevs = [f'net_virtio_user{i},path={folder}/v{i}.sock,queues=1,queue_size={args.queue_size},mac=02:00:00:00:00:0{i}'
             f'{ring}{server}' for i in (0, 1)]
    options = [f'--txpkts={size}', f'--rxd={args.queue_size}', f'--txd={args.queue_size}',
               '--eth-peer=0,02:00:00:00:00:01', '--eth-peer=1,02:00:00:00:00:00']
    pmd = Testpmd(folder, 'generator', [args.cores[0]] * 2, vdevs, options)
    try:
        # A switch may answer that a ring is enabled before it forwards: what gets lost until then does not count.
        end_of_patience = time.monotonic() + 10
        while lost := short_loop(pmd, args):
            if time.monotonic() > end_of_patience:
                return {'mpps': 0.0, 'lost': lost}
        pmd.ask('clear port stats all')
        pmd.ask('set fwd mac')
        pmd.ask(f'start tx_first {max(1, args.in_flight // TESTPMD_BURST)}')
        time.sleep(0.3)
        before, started = pmd.counters(), time.monotonic()
        time.sleep(args.seconds)
        after, ended = pmd.counters(), time.monotonic()
        drain(pmd)
        rest = pmd.counters()
    finally:
        pmd.stop()
    received = sum(after[port][0] - before[port][0] for port in after)
    return {'mpps': received / (ended - started) / 1e6, 'lost': missing(rest)}


def short_loop(pmd, args):
    """How many frames of a short closed loop were lost."""
    pmd.ask('clear port stats all')
    pmd.ask('set fwd mac')
    pmd.ask(f'start tx_first {max(1, args.in_flight // TESTPMD_BURST)}')
    time.sleep(0.2)
    drain(pmd)
    counters = pmd.counters()
    return missing(counters)


def missing(counters):
    """Frames that one port sent and the other did not get."""
    return sum(counters[1 - port][1] - counters[port][0] for port in counters)


def drain(pmd):
    """Ends the loop and takes in what the switch and the rings still hold."""
    pmd.ask('stop')
    pmd.ask('set fwd rxonly')
    pmd.ask('start')
    time.sleep(0.3)
    pmd.ask('stop')


GENERATORS = {'cableway': by_cableway, 'testpmd': by_testpmd}


def measure(name, generator, size, args):
    """One measurement of one switch by one generator, from start to end."""
    with tempfile.TemporaryDirectory(prefix='compare-') as folder:
        folder = pathlib.Path(folder)
        subject = switch(name, folder, size, args)
        try:
            return GENERATORS[generator](folder, subject.connects, size, args)
        finally:
            subject.stop()


def prepare(args):
    """Says what is missing, before anything starts."""
    generators, switches = args.generators, args.switches
    if 'cableway' in generators + switches and not os.access(args.cableway, os.X_OK):
        raise Missing(f'{args.cableway} is not there: cargo build --release')
    absent = sorted(set(args.cores) - os.sched_getaffinity(0))
    if absent:
        raise Missing(f'this process may not use core {absent[0]}; it may use {sorted(os.sched_getaffinity(0))}: --cores A,B')
    for name in switches:
        program = shlex.split(name.removeprefix('cmd:'))[:1] if name.startswith('cmd:') else []
        if program and not shutil.which(program[0]):
            raise Missing(f'{name}: there is no program {program[0]}')
    testpmd, ovs = 'testpmd' in generators + switches, 'ovs' in switches
    if testpmd and not shutil.which('dpdk-testpmd'):
        raise Missing('DPDK\'s testpmd is not installed: apt-get install dpdk-dev')
    if ovs and not (os.path.exists(OVS_DAEMON) and shutil.which('ovs-vsctl') and shutil.which('ovsdb-server')):
        raise Missing('OVS-DPDK is not installed: apt-get install openvswitch-switch-dpdk')
    if testpmd or ovs:
        if os.geteuid() != 0:
            raise Missing('testpmd and OVS-DPDK need root here: sudo, or leave them out (switches: cableway; --generator cableway)')
        reserve_huge_pages()


def reserve_huge_pages():
    """At least as many free ones as a switch and a generator of DPDK's take."""
    total, free = (HUGE_PAGES / name for name in ('nr_hugepages', 'free_hugepages'))
    try:
        missing = HUGE_PAGES_NEEDED - int(free.read_text())
        if missing > 0:
            wanted = int(total.read_text()) + missing
            print(f'reserving huge pages: echo {wanted} > {total}', file=sys.stderr)
            total.write_text(str(wanted))
        left = int(free.read_text())
    except OSError as why:
        raise Missing(f'huge pages of 2 MiB cannot be reserved here ({why}): boot the machine, or the host of this container, with '
                      f'hugepages={HUGE_PAGES_NEEDED} on the kernel\'s command line') from None
    if left < HUGE_PAGES_NEEDED:
        raise Missing(f'DPDK needs {HUGE_PAGES_NEEDED} free huge pages of 2 MiB, there are {left} and the kernel finds no more in one '
                      f'piece: end what uses much memory, then: sync; echo 3 > /proc/sys/vm/drop_caches; '
                      f'echo 1 > /proc/sys/vm/compact_memory; echo {int(total.read_text()) + HUGE_PAGES_NEEDED - left} > {total}; '
                      f'or boot with hugepages={HUGE_PAGES_NEEDED} on the kernel\'s command line')


def attempt(name, generator, size, args):
    """The same, where a switch that does not do its part is a result too: those after it are still of interest."""
    try:
        return measure(name, generator, size, args)
    except (Broken, subprocess.TimeoutExpired) as why:
        print(f'{name}, {size} B by {generator}: {why}', file=sys.stderr, flush=True)
        return {'mpps': 0.0, 'lost': 0, 'broken': str(why)}


def report(size, generator, runs):
    """The lines of one frame size and generator. Returns whether all is well."""
    well, first, base = True, next(iter(runs)), None
    for name, rounds in runs.items():
        rates = [r['mpps'] for r in rounds]
        lost = sum(r['lost'] for r in rounds)
        median = statistics.median(rates)
        base = median if base is None else base
        ratio = f'{median / base:5.2f} x {first[:12]}' if base else ''
        broken = sum('broken' in r for r in rounds)
        busy = statistics.median(r.get('generator_busy', 0) for r in rounds)
        note = '  generator at its limit' if busy > 0.95 else ''
        note += f'  FAILED in {broken} of {len(rounds)} rounds, the reason is above' if broken else ''
        print(f'{size:5} B  by {generator:8}  {name[:44]:12} {median:7.2f} Mpps  ({min(rates):.2f} to {max(rates):.2f})  {ratio}'
              f'  lost {lost}{note}', flush=True)
        well &= min(rates) > 0 and lost == 0
    return well


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('switches', nargs='*', default=['testpmd', 'ovs', 'cableway'], help='testpmd, ovs, cableway, cmd:…')
    p.add_argument('--generator', choices=('cableway', 'testpmd', 'both'), default='both')
    p.add_argument('--sizes', default='64', help='frame sizes in bytes without FCS, with commas between (default 64)')
    p.add_argument('--ring', choices=('split', 'packed'), default='split')
    p.add_argument('--queue-size', type=int, default=256, help='entries of each ring (default 256)')
    p.add_argument('--in-flight', type=int, default=128, help='frames in flight (testpmd: each way; default 128)')
    p.add_argument('--addresses', type=int, default=1, help='addresses behind each port (testpmd always has one)')
    p.add_argument('--rounds', type=int, default=3, help='measurements of each switch and generator (default 3)')
    p.add_argument('--seconds', type=float, default=2.0, help='of each measurement (default 2)')
    p.add_argument('--cores', default='0,1', help='the generator\'s and the switch\'s (default 0,1; as in --config)')
    p.add_argument('--cableway', default=str(ROOT / 'target/release/cableway'), help='the program')
    p.add_argument('--config', default=str(ROOT / 'configs/vv.toml'), help='the configuration of `cableway`')
    p.add_argument('--json', action='store_true', help='every measurement as JSON, after the table')
    args = p.parse_args()
    args.generators = list(GENERATORS) if args.generator == 'both' else [args.generator]
    try:
        args.cores = [int(core) for core in args.cores.split(',')]
        args.sizes = [int(size) for size in args.sizes.split(',')]
    except ValueError as why:
        p.error(f'--cores and --sizes take numbers with commas between: {why}')
    if len(args.cores) != 2:
        p.error('--cores: give two, the generator\'s and the switch\'s')
    if args.rounds < 1 or args.seconds <= 0:
        p.error('--rounds and --seconds must be above 0')
    for name in args.switches:
        if name not in ('testpmd', 'ovs', 'cableway') and not name.startswith('cmd:'):
            p.error(f'{name}: give testpmd, ovs, cableway or cmd:…')
    return args


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args = arguments()
    everything, well = [], True
    try:
        prepare(args)
        for size in args.sizes:
            runs = {generator: {name: [] for name in args.switches} for generator in args.generators}
            for _ in range(args.rounds):
                for generator, of in runs.items():
                    for name in of:
                        of[name].append(attempt(name, generator, size, args))
            for generator, of in runs.items():
                well &= report(size, generator, of)
                everything.append({'size': size, 'generator': generator, 'switches': of})
    except Missing as why:
        print(why, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if args.json:
        print(json.dumps({'args': vars(args), 'runs': everything}))
    return 0 if well else 1


if __name__ == '__main__':
    sys.exit(main())
