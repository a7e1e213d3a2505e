package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// printHead prints what is compared.
func printHead(o options, peers []*peer) {
	fmt.Printf("%d turns of %v for each server and load, in alternating order; CPU time counts until %v after the load.\n\n", o.rounds, o.length, afterwards)
	fmt.Print("| server | version | question | recorded |\n|---|---|---|---|\n")
	for _, p := range peers {
		version := "this repository"
		if p.tool != nil {
			version = p.tool.version
		}
		if p.missing != nil {
			fmt.Printf("| %s | %s | %s | |\n", p.name, version, p.reason())
			continue
		}
		fmt.Printf("| %s | %s | %s | %s |\n", p.name, version, p.question, p.recorded)
	}
	fmt.Println()
}

// reason says in a cell of a table why a server is not measured.
func (p *peer) reason() string {
	return fmt.Sprintf("not measured: %.200s", strings.NewReplacer("\n", " ", "|", "\\|").Replace(p.missing.Error()))
}

func printTableHead() {
	fmt.Println("| connections | server | req/s | of constant | p50 | p99 | errors | bad of sampled | CPU µs/req: server | database | of constant | MB: server | database | records/req |")
	fmt.Println("|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
}

// row sums up the turns of one server.
type row struct {
	rate, ratio          float64 // ratio: to the constant answer
	p50, p99             time.Duration
	errors               int
	samples, bad         int
	server, database     float64 // CPU µs a request
	cpuRatio             float64 // of both together, to the constant answer
	memServer, memDB     int64
	recorded             float64 // records a request
	requests, recordsSum int64
}

// sum takes the medians of rates, percentiles and memory, and the quotient of all CPU time and all
// requests. A ratio is the median of the ratios of turns of the same round.
func sum(turns, constant []turn) row {
	var r row
	for _, t := range turns {
		r.errors += t.errors
		r.samples += t.samples
		r.bad += t.bad
		r.requests += int64(t.requests)
		r.recordsSum += t.recorded
	}
	r.rate, r.p50, r.p99 = medianRate(turns), median(turns, func(t turn) time.Duration { return t.p50 }), median(turns, func(t turn) time.Duration { return t.p99 })
	r.memServer, r.memDB = median(turns, func(t turn) int64 { return t.memory.server }), median(turns, func(t turn) int64 { return t.memory.database })
	r.server, r.database = perRequest(turns)
	if len(constant) == len(turns) {
		var ratios []float64
		for i := range turns {
			ratios = append(ratios, turns[i].rate()/constant[i].rate())
		}
		slices.Sort(ratios)
		r.ratio = ratios[len(ratios)/2]
		base, _ := perRequest(constant)
		r.cpuRatio = (r.server + r.database) / base
	}
	r.recorded = float64(r.recordsSum) / float64(r.requests)
	return r
}

// perRequest returns the CPU time of server and database in microseconds a request.
func perRequest(turns []turn) (server, database float64) {
	var requests int
	var used usage[time.Duration]
	for _, t := range turns {
		requests += t.requests
		used.server += t.cpu.server
		used.database += t.cpu.database
	}
	n := float64(requests) * float64(time.Microsecond)
	return float64(used.server) / n, float64(used.database) / n
}

func medianRate(turns []turn) float64 { return median(turns, turn.rate) }

func median[T float64 | int64 | time.Duration](turns []turn, of func(turn) T) T {
	if len(turns) == 0 {
		return 0
	}
	var values []T
	for _, t := range turns {
		values = append(values, of(t))
	}
	slices.Sort(values)
	return values[len(values)/2]
}

// printRows prints the servers under one load.
func printRows(peers []*peer, load load, turns map[string][]turn) {
	connections := fmt.Sprint(load.connections)
	if load.batch {
		connections += fmt.Sprintf(" × %d", batchSize)
	}
	for _, p := range peers {
		switch {
		case p.missing != nil:
			fmt.Printf("| %s | %s | %s | | | | | | | | | | | |\n", connections, p.name, p.reason())
		case len(turns[p.name]) > 0:
			r := sum(turns[p.name], turns[constantName])
			recorded := "0"
			if r.recordsSum >= 0 {
				recorded = fmt.Sprintf("%.2f", r.recorded)
			}
			if r.requests == 0 {
				fmt.Printf("| %s | %s | no answer with success | | | | %d | %d of %d | | | | %d | %d | |\n", connections, p.name,
					r.errors, r.bad, r.samples, r.memServer>>20, r.memDB>>20)
				continue
			}
			fmt.Printf("| %s | %s | %.0f | %.3f | %v | %v | %d | %d of %d | %.0f | %.0f | %.2f | %d | %d | %s |\n", connections, p.name, r.rate, r.ratio,
				short(r.p50), short(r.p99), r.errors, r.bad, r.samples, r.server, r.database, r.cpuRatio, r.memServer>>20, r.memDB>>20, recorded)
		}
	}
}

func short(d time.Duration) time.Duration { return d.Round(10 * time.Microsecond) }

// sustain drives one server for long and prints whether its memory stays flat and how much work it
// put off. No other server is driven meanwhile.
func sustain(ctx context.Context, l *loader, p *peer, load load, length time.Duration) error {
	fmt.Fprintf(os.Stderr, "sustained: %s, %v, %v\n", p.name, load, length)
	proc := os.DirFS("/proc")
	start, err := memory(proc, p.pids)
	if err != nil {
		return err
	}
	watching, stop := context.WithCancel(ctx)
	watched := make(chan []usage[int64], 1)
	go func() {
		var each []usage[int64]
		for pause(watching, time.Second) == nil {
			if m, err := memory(proc, p.pids); err == nil {
				each = append(each, m)
			}
		}
		watched <- each
	}()
	t, err := l.drive(ctx, p, load, length)
	stop()
	each := <-watched
	if err != nil {
		return err
	}
	// drive has counted the first second after the load. If the second one is no busier than an
	// idle server, nothing was left.
	first, err := cpu(proc, p.pids)
	if err != nil {
		return err
	}
	if err := pause(ctx, time.Second); err != nil {
		return err
	}
	second, err := cpu(proc, p.pids)
	if err != nil {
		return err
	}
	r := sum([]turn{t}, nil)
	fmt.Printf("### Sustained: %s, %v, for %v\n\n", p.name, load, length)
	fmt.Print("| req/s | p50 | p99 | errors | CPU µs/req: server | database | records/req |\n|---:|---:|---:|---:|---:|---:|---:|\n")
	fmt.Printf("| %.0f | %v | %v | %d | %.0f | %.0f | %.3f |\n\n", r.rate, short(r.p50), short(r.p99), r.errors, r.server, r.database, r.recorded)
	fmt.Print("| MB | before | after a tenth | at the end | most |\n|---|---:|---:|---:|---:|\n")
	tenth, most := start, start
	for i, m := range each {
		if i == len(each)/10 {
			tenth = m
		}
		most.server, most.database = max(most.server, m.server), max(most.database, m.database)
	}
	fmt.Printf("| server | %d | %d | %d | %d |\n", start.server>>20, tenth.server>>20, t.memory.server>>20, most.server>>20)
	fmt.Printf("| database | %d | %d | %d | %d |\n\n", start.database>>20, tenth.database>>20, t.memory.database>>20, most.database>>20)
	fmt.Print("| CPU time after the load | server | database |\n|---|---:|---:|\n")
	fmt.Printf("| in the first second, which counts | %v | %v |\n", t.late.server, t.late.database)
	fmt.Printf("| in the next one, when all work must be done | %v | %v |\n", second.server-first.server, second.database-first.database)
	return nil
}
