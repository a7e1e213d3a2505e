// Command peers measures Cedarpost beside other authorization servers, for make bench-peers. It
// exists because figures of different machines and days do not compare: here all servers run side
// by side, answer the same question, and take turns of a few seconds.
//
// It builds the other servers from their modules, gives each one the example shop in its own
// form, checks its answers, and drives it from another process. It reads CPU time and memory from
// /proc, so it needs Linux. The tables go to stdout as Markdown, the progress to stderr.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// options are the flags.
type options struct {
	peers       []string
	connections []int
	rounds      int
	length      time.Duration // of one turn
	batch       int           // connections that ask for batches; 0: no batches
	grpc        bool
	sustained   time.Duration // 0: no sustained run
	cedarpost   string        // the program
	build       string        // folder for what is built and for the data of servers
}

func main() {
	if len(os.Args) == 3 && os.Args[1] == "constant" {
		exit(serveConstant(os.Args[2]))
	}
	o, err := parse(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-peers:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err = run(ctx, o)
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	stop()
	exit(err)
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-peers:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func parse(args []string) (o options, err error) {
	flags := flag.NewFlagSet("bench-peers", flag.ExitOnError)
	peers := flags.String("peers", strings.Join(names(), ","), "servers to measure; constant is always among them")
	connections := flags.String("connections", "1,16,64,256", "numbers of connections, each with one question at a time")
	flags.IntVar(&o.rounds, "rounds", 3, "turns of each server; the median counts")
	seconds := flags.Int("seconds", 5, "length of a turn")
	flags.IntVar(&o.batch, "batch", 16, "connections that ask for batches of 50; 0 means no batches")
	flags.BoolVar(&o.grpc, "grpc", true, "also measure gRPC")
	sustained := flags.Int("sustained", 60, "seconds of the sustained run of cedarpost; 0 means none")
	flags.StringVar(&o.cedarpost, "cedarpost", "bin/cedarpost", "the program cedarpost")
	flags.StringVar(&o.build, "build", ".build", "folder for the programs of other projects, and for the data of servers")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	o.peers = strings.Split(*peers, ",")
	for _, name := range o.peers {
		if !slices.Contains(names(), name) {
			return o, fmt.Errorf("-peers: there is no %q; there are %s", name, strings.Join(names(), ", "))
		}
	}
	for text := range strings.SplitSeq(*connections, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			return o, fmt.Errorf("-connections: %q is not a positive number", text)
		}
		o.connections = append(o.connections, n)
	}
	if o.rounds < 1 || *seconds < 1 || *sustained < 0 || o.batch < 0 {
		return o, errors.New("give at least one round and one second, and nothing negative")
	}
	o.length, o.sustained = time.Duration(*seconds)*time.Second, time.Duration(*sustained)*time.Second
	if o.build, err = filepath.Abs(o.build); err != nil {
		return o, err
	}
	o.cedarpost, err = filepath.Abs(o.cedarpost)
	return o, err
}

// run starts the servers, measures and prints. All that it started has ended when it returns.
func run(ctx context.Context, o options) (err error) {
	if err := os.MkdirAll(o.build, 0o755); err != nil {
		return err
	}
	s := &starter{options: o}
	if s.work, err = os.MkdirTemp(o.build, "peers-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	if err := os.Chmod(s.work, 0o755); err != nil { // for the user postgres
		return err
	}
	shop, err := readShop()
	if err != nil {
		return err
	}
	var peers []*peer
	for _, p := range all {
		if p.name != constantName && !slices.Contains(o.peers, p.name) {
			continue
		}
		fmt.Fprintln(os.Stderr, "start", p.name)
		started, err := s.start(ctx, p, shop)
		if err != nil {
			if ctx.Err() != nil || p.name == constantName {
				return err
			}
			// The tables name the server, with the reason.
			fmt.Fprintf(os.Stderr, "%s is left out: %v\n", p.name, err)
			started = &peer{kind: p, missing: err}
		}
		peers = append(peers, started)
	}

	ghz := ""
	if o.grpc {
		ghz, err = ghzTool.build(ctx, s.bin())
		if err != nil {
			if ctx.Err() != nil {
				return err
			}
			fmt.Printf("gRPC was not measured: %v\n\n", err)
		}
	}
	l := &loader{dir: s.work, ghz: ghz}
	printHead(o, peers)
	best := load{connections: o.connections[0]}
	bestRate := 0.0
	for _, protocol := range []string{"JSON over HTTP/1.1", "gRPC"} {
		overGRPC := protocol == "gRPC"
		if overGRPC && ghz == "" {
			continue
		}
		fmt.Printf("### %s\n\n", protocol)
		printTableHead()
		var loads []load
		for _, n := range o.connections {
			loads = append(loads, load{connections: n, grpc: overGRPC})
		}
		if o.batch > 0 {
			loads = append(loads, load{connections: o.batch, grpc: overGRPC, batch: true})
		}
		for _, load := range loads {
			turns, err := takeTurns(ctx, l, peers, load, o)
			if err != nil {
				return err
			}
			printRows(peers, load, turns)
			if rate := medianRate(turns[cedarpostName]); !load.batch && !overGRPC && rate > bestRate {
				best, bestRate = load, rate
			}
		}
		fmt.Println()
	}
	for _, p := range peers {
		if p.name == cedarpostName && p.missing == nil && o.sustained > 0 {
			return sustain(ctx, l, p, best, o.sustained)
		}
	}
	return nil
}

// takeTurns returns the turns of each server, by its name. A server that fails as a whole is missing
// from then on.
func takeTurns(ctx context.Context, l *loader, peers []*peer, load load, o options) (map[string][]turn, error) {
	turns := map[string][]turn{}
	for round := range o.rounds + 1 { // the first one is short, and warms the servers
		for i := range peers {
			p := peers[(i+round)%len(peers)]
			if p.missing != nil || !p.takes(load) {
				continue
			}
			length := o.length
			if round == 0 {
				length = time.Second
			}
			t, err := l.drive(ctx, p, load, length)
			switch {
			case ctx.Err() != nil || err != nil && p.name == constantName:
				return nil, errors.Join(ctx.Err(), err)
			case err != nil: // the rest of the run goes on without it
				fmt.Fprintf(os.Stderr, "%s is left out from here on: %v\n", p.name, err)
				p.missing = err
			case round > 0:
				fmt.Fprintf(os.Stderr, "%v, round %d, %s: %.0f req/s, p99 %v, %d errors\n", load, round, p.name, t.rate(), short(t.p99), t.errors)
				turns[p.name] = append(turns[p.name], t)
			}
		}
	}
	return turns, nil
}
