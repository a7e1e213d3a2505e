package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/store/storetest"
)

// users returns lines of NDJSON for users with numbers from one up to another.
func users(from, to int) string {
	var b strings.Builder
	for n := from; n < to; n++ {
		fmt.Fprintf(&b, `{"uid": {"type": "Shop::User", "id": "n%d"}, "attrs": {"region": "eu", "suspended": false}, "parents": [{"type": "Shop::Role", "id": "support"}]}`+"\n", n)
	}
	return b.String()
}

const userMapping = `
type: Shop::User
id: login
parents: [{type: Shop::Role, column: roles, split: ";"}]
attrs: {region: region, suspended: {column: off, as: bool}}
`

func testImport(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		dir := t.TempDir()
		mapping := write(t, dir, "map.yaml", userMapping)
		for _, c := range []struct {
			name, text, args string
			code             int
			says             string
		}{
			{"ok.json", `[{"uid": {"type": "Shop::User", "id": "i-json"}, "attrs": {"region": "eu", "suspended": false}}]`, ``, 0, "1 entity imported, 1 new or changed in "},
			{"ok.NDJSON", "\n" + users(0, 2), ``, 0, "2 entities imported, 2 new or changed in "},
			{"ok.txt", users(0, 3), `--format ndjson`, 0, "3 entities imported, 1 new or changed in "},
			{"ok.csv", "\ufefflogin,off,roles,region\ni-csv,true,support;finance,us\n", `--map ` + mapping, 0, "1 entity imported, 1 new or changed in "},
			{"dry.jsonl", users(3, 5) + users(0, 1), `--dry-run`, 0, "dry run: 3 entities read, nothing was sent"},
			{"dry.jsonl", users(3, 5), `--dry-run -o json`, 0, `"entities":"2"`},
			{"one.json", "[]", ``, 1, "one.json holds no entities"},
			{"none.csv", "login,off,roles,region\n", `--dry-run --map ` + mapping, 1, "none.csv holds no entities"},
			{"bad.ndjson", users(3, 5) + "{}\n", ``, 1, "bad.ndjson: line 3: uid is missing\n  nothing was sent"},
			{"bad.ndjson", users(3, 5) + "{}\n", `--dry-run`, 1, "bad.ndjson: line 3: uid is missing"},
			{"late.ndjson", users(1000, 2100) + "{}\n", ``, 1, "late.ndjson: line 1101: uid is missing\n  1,000 entities are stored; when the cause is corrected, --import-id sha256:"},
			{"schema.ndjson", users(1000, 2000) + `{"uid": {"type": "Shop::Ghost", "id": "x"}}`, `--import-id ghosts`, 1, `invalid_argument: entity 1001: Shop::Ghost`},
			{"twice.json", `[{"uid": {"type": "Shop::User", "id": "twice"}, "attrs": {"region": "eu", "suspended": true, "suspended": false}}]`, ``, 1, "twice.json: entity 1, line 1: member \"suspended\" is twice in an object, at /attrs/suspended\n  nothing was sent"},
			{"twice.ndjson", users(2200, 2300) + users(2250, 2251), ``, 1, "twice.ndjson: line 101: entity Shop::User::\"n2250\" is in the file twice, first on line 51\n  nothing was sent"},
			{"far.ndjson", users(4200, 5300) + users(4250, 4251), ``, 1, "line 1101: entity Shop::User::\"n4250\" is in the file twice, first on line 51\n  1,000 entities are stored; if you correct the second of the two, --import-id sha256:"},
			{"far.ndjson", users(4200, 5300) + users(4250, 4251), `--dry-run`, 1, "line 1101: entity Shop::User::\"n4250\" is in the file twice, first on line 51"},
			{"twice.csv", "login,off,roles,region\na,true,,eu\na,false,,eu\n", `--map ` + mapping, 1, `twice.csv: line 3: entity Shop::User::"a" is in the file twice, first on line 2`},
			{"atomic.ndjson", users(3000, 4100) + "{}\n", `--atomic`, 1, "line 1101: uid is missing\n  nothing is stored"},
			{"columns.csv", "login,off,roles\na,true,\n", `--map ` + mapping, 1, `columns.csv: line 1: no column "region"; there are ["login" "off" "roles"]`},
			{"cell.csv", "login,off,roles,region\na,true,,eu\nb,no,,eu\n", `--map ` + mapping, 1, `cell.csv: line 3: column "off": "no" is neither true nor false`},
			{"mapping.csv", "", `--map ` + write(t, dir, "bad.yaml", "type: T\nids: login\n"), 1, `bad.yaml: line 2: a mapping has no key "ids"`},
			{"none", "", `--resume`, 1, "there is no unfinished import to resume"},
		} {
			file := write(t, dir, c.name, c.text)
			sh.exits(t, c.code, says(c.says), append([]string{"entities", "import", file}, strings.Fields(c.args)...)...)
		}
		sh.exits(t, 0, says(`Shop::User::"i-csv"`, `parents      Shop::Role::"finance", Shop::Role::"support"`, `{"region":"us","suspended":true}`), "entities", "get", "Shop::User::i-csv")
		sh.exits(t, 1, says("not_found"), "entities", "get", "Shop::User::n3") // only in refused files and in the dry run
		sh.exits(t, 1, says("not_found"), "entities", "get", "Shop::User::n3000")
		sh.exits(t, 0, says("1,100 entities imported, 1,100 new"), "entities", "import", "--atomic", write(t, dir, "atomic.ndjson", users(3000, 4100)))

		// A refused import continues once the file is corrected, and only after the stored ones.
		corrected := write(t, dir, "schema.ndjson", users(1000, 2001))
		sh.exits(t, 0, says("continuing after 1,000 entities", "1 entity imported, 1 new"), "entities", "import", corrected, "--import-id=ghosts", "--resume")
		sh.exits(t, 1, says("there is no unfinished import"), "entities", "import", corrected, "--import-id=ghosts", "--resume")

		// An import of stdin can be resumed with an id.
		for _, step := range []struct {
			text string
			code int
			says string
			args []string
		}{
			{users(0, 1100) + "{}", 1, "-: line 1101: uid is missing\n  1,000 entities are stored", nil},
			{users(0, 1100) + "{}", 1, "1,000 entities are stored; when the cause is corrected, --import-id pipe --resume continues", []string{"--import-id=pipe"}},
			{users(0, 500), 1, "holds 500 entities, fewer than the 1000 that are stored", []string{"--import-id=pipe", "--resume"}},
			{users(0, 1100), 0, "continuing after 1,000 entities that are stored\n100 entities imported", []string{"--import-id=pipe", "--resume"}},
		} {
			cmd := exec.Command(binary, append([]string{"entities", "import", "-", "--format=ndjson"}, step.args...)...)
			cmd.Env, cmd.Stdin = sh.env, strings.NewReader(step.text)
			out, err := cmd.CombinedOutput()
			if !strings.Contains(string(out), step.says) || cmd.ProcessState.ExitCode() != step.code {
				t.Errorf("%v: %v\n%s", step.args, err, out)
			}
		}
	}
}

// ground is a server with a Postgres of its own. It can be killed, and started again at the same
// address.
type ground struct {
	*shell
	pg     *pgx.Conn
	daemon *daemon
	args   []string
	key    string
}

func newGround(t *testing.T) *ground {
	t.Helper()
	cluster := storetest.NewServer(t)
	g := &ground{key: filepath.Join(t.TempDir(), "key")}
	g.args = append([]string{"serve", "--development-database", "--database-url", cluster.URL(), "--bootstrap-key-file", g.key}, anyPort...)
	newShell().exits(t, 0, nil, "migrate", "--database-url", cluster.URL())
	g.args = append(g.args, "--admin-listen", freePort(t))
	g.daemon = newShell().start(t, g.args...)
	g.shell = newShell("CEDARPOST_TOKEN_FILE="+g.key, "CEDARPOST_ADMIN_URL="+g.daemon.url("admin"))
	g.exits(t, 0, nil, "apply", "../../policies/shop")
	var err error
	if g.pg, err = pgx.Connect(t.Context(), cluster.URL()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.pg.Close(context.Background()) })
	return g
}

// hold blocks all writes after an import has stored some entities, until release.
func (g *ground) hold(t *testing.T) (stored int64, release func()) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		var tx pgx.Tx
		err := g.pg.QueryRow(t.Context(), `select entities from imports where entities >= 1000`).Scan(&stored)
		if err == nil {
			if tx, err = g.pg.Begin(t.Context()); err == nil {
				_, err = tx.Exec(t.Context(), `select n from revision for update`)
			}
			if err == nil {
				err = tx.QueryRow(t.Context(), `select entities from imports`).Scan(&stored)
			}
			if err != nil {
				t.Fatal(err)
			}
			return stored, func() { _ = tx.Rollback(context.Background()) }
		}
		if !errors.Is(err, pgx.ErrNoRows) {
			t.Fatal(err)
		}
	}
	t.Fatal("nothing is imported")
	return 0, nil
}

func (g *ground) imports(t *testing.T) (n int) {
	t.Helper()
	if err := g.pg.QueryRow(t.Context(), `select count(*) from imports`).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// background runs a command. Its output is complete when wait returns.
func (g *ground) background(t *testing.T, args ...string) (cmd *exec.Cmd, out *syncBuffer, wait func() int) {
	t.Helper()
	out = &syncBuffer{}
	cmd = exec.Command(binary, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = g.env, out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-ended })
	return cmd, out, func() int { <-ended; return cmd.ProcessState.ExitCode() }
}

// An import survives the end of its server: it continues by itself, and does not undo changes made
// meanwhile. An interrupted import continues with --resume.
func TestImportGoesOn(t *testing.T) {
	t.Parallel() // it takes long
	g := newGround(t)
	file := write(t, t.TempDir(), "users.ndjson", users(0, 4000))
	revoked := write(t, t.TempDir(), "revoked.json", `[{"uid": {"type": "Shop::User", "id": "n0"}, "attrs": {"region": "eu", "suspended": true}}]`)

	_, out, wait := g.background(t, "entities", "import", file)
	stored, release := g.hold(t)
	g.daemon.stop(t, syscall.SIGKILL)
	release()
	other := newShell().start(t, append(g.args, "--admin-listen=127.0.0.1:0")...)
	g.with("CEDARPOST_ADMIN_URL="+other.url("admin")).exits(t, 0, says("1 entity imported, 1 new"), "entities", "import", revoked)
	g.daemon = newShell().start(t, g.args...)
	if code := wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	for _, words := range []string{"the connection to the server is lost; the import continues when the server is back", fmt.Sprintf("continuing after %s that are stored", entities(stored)), "4,000 entities imported, at least "} {
		if !strings.Contains(out.String(), words) && stored < 4000 {
			t.Errorf("does not say %q\n%s", words, out)
		}
	}
	g.exits(t, 0, says(`"suspended":true`), "entities", "get", "Shop::User::n0")
	g.exits(t, 0, says(`"suspended":false`), "entities", "get", "Shop::User::n3999")
	if n := g.imports(t); n != 0 {
		t.Errorf("%d imports are unfinished", n)
	}

	// An import is interrupted, and resumed.
	file = write(t, t.TempDir(), "users.ndjson", users(10_000, 14_000))
	cmd, out, wait := g.background(t, "entities", "import", file)
	stored, release = g.hold(t)
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	code := wait()
	release()
	if want := fmt.Sprintf("cedarpost: interrupted\n  %s are stored; run the same command with --resume to continue\n", entities(stored)); code != 1 || !strings.Contains(out.String(), want) {
		t.Errorf("exit code %d\n%s", code, out)
	}
	// The server may have stored more of what it had received.
	g.exits(t, 0, says("continuing after ", " entities imported, "), "entities", "import", file, "--resume")
	g.exits(t, 0, says(`"suspended":false`), "entities", "get", "Shop::User::n13999")
	g.exits(t, 1, says("there is no unfinished import to resume"), "entities", "import", file, "--resume")

	t.Run("streams", func(t *testing.T) { testStreams(t, g) })
	t.Run("lost", func(t *testing.T) { testLost(t, g) })
}

// smallImporter imports NDJSON in this process, so that a test can read its fields.
func (g *ground) smallImporter(t *testing.T, id, text string) *importer {
	t.Helper()
	admin, err := dial(value(g.env, adminEnv), adminEnv, g.key, clientTLSFlags{})
	if err != nil {
		t.Fatal(err)
	}
	i := newImporter(admin, &input{name: "x", format: formatNDJSON, r: strings.NewReader(text), again: true}, nil)
	i.id, i.patience = id, 500*time.Millisecond
	return i
}

// An import takes as many streams as it needs, and only the last one ends it.
func testStreams(t *testing.T, g *ground) {
	for _, id := range []string{"", "streams"} {
		count := func() (n int) {
			if err := g.pg.QueryRow(t.Context(), `select n from revision`).Scan(&n); err != nil {
				t.Fatal(err)
			}
			return n
		}
		before := count()
		i := g.smallImporter(t, id, users(20_000, 26_500))
		i.perStream = 2000
		if err := i.run(t.Context()); err != nil {
			t.Fatal(err)
		}
		if i.total.Entities != 6500 || i.stored != 6500 || count() != before+int(i.total.Changed+999)/1000 || i.total.Revision.GetNumber() != int64(count()) {
			t.Errorf("%v, revision %d after %d", i.total, count(), before)
		}
	}
	if n := g.imports(t); n != 0 {
		t.Errorf("%d imports are unfinished", n)
	}
}

// After the loss of its server, an importer draws the right conclusion.
func testLost(t *testing.T, g *ground) {
	loss := connect.NewError(connect.CodeUnavailable, "gone")
	bad := g.smallImporter(t, "lost", users(0, 2000)+"{}")
	if err := bad.run(t.Context()); err == nil || bad.stored != 2000 {
		t.Fatalf("%v, %d entities", err, bad.stored)
	}
	for _, c := range []struct {
		name         string
		id           string
		stored, sent int64
		ending, anew bool
		want         string
	}{
		{"goes on from what is stored", "lost", 1000, 3000, false, false, "2000"},
		{"nothing more is stored", "lost", 2000, 3000, false, false, "2000"},
		{"more is stored than was sent", "lost", 1000, 1500, false, false, "another process"},
		{"less is stored than was known", "lost", 3000, 4000, false, false, "another process"},
		{"nothing is stored of the new one", "lost", 0, 3000, false, true, "0"},
		{"nothing was stored yet", "new", 0, 1000, false, false, "0"},
		{"it is gone", "new", 1000, 2000, false, false, "another process"},
		{"it is gone, as it should be", "new", 2000, 2000, true, false, "ended"},
		{"the end did not arrive", "lost", 2000, 2000, true, false, "2000"},
	} {
		i := g.smallImporter(t, c.id, "")
		if c.anew {
			if err := i.begin(t.Context(), false); err != nil || i.old == nil {
				t.Fatal(err)
			}
		}
		i.stored, i.reach, i.ending = c.stored, c.sent, c.ending
		i.until, i.wait = time.Now().Add(time.Minute), time.Millisecond
		ended, err := i.again(t.Context(), loss)
		got := fmt.Sprint(i.stored)
		if ended {
			got = "ended"
		}
		if err != nil {
			got = err.Error()
		}
		if !strings.HasPrefix(got, c.want) {
			t.Errorf("%s: got %s, want %s", c.name, got, c.want)
		}
	}
	// An importer gives up on a server that does not come back.
	i := g.smallImporter(t, "lost", users(0, 2000))
	if err := i.begin(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	g.daemon.stop(t, syscall.SIGTERM)
	err := i.run(t.Context())
	if connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("got %v", err)
	}
	if err = i.advise(err); !strings.Contains(err.Error(), "run the same command with --resume to continue") {
		t.Errorf("got %v", err)
	}
}

func TestLostOrRefused(t *testing.T) {
	for _, c := range []struct {
		code           connect.Code
		remote, broken bool
		lost           bool
	}{
		{connect.CodeUnavailable, true, false, true},
		{connect.CodeUnavailable, false, false, true},
		{connect.CodeDeadlineExceeded, true, false, true},
		{connect.CodeCanceled, false, false, true},
		{connect.CodeCanceled, true, false, false},
		{connect.CodeInternal, false, false, true},
		{connect.CodeInternal, true, false, false},
		{connect.CodeInvalidArgument, true, true, false},
		{connect.CodeAborted, true, true, false},
		{connect.CodeFailedPrecondition, true, false, false},
		{connect.CodeFailedPrecondition, true, true, true},
	} {
		err := connect.NewError(c.code, "x")
		if c.remote {
			err = err.WithRemote()
		}
		if got := (&importer{broken: c.broken}).isLoss(err); got != c.lost {
			t.Errorf("%+v: lost %v", c, got)
		}
	}
}

// Lots have the size of a message, and the input is read only a little ahead of them.
func TestLots(t *testing.T) {
	large := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `{"uid": {"type": "T", "id": "%d%s"}}`+"\n", i, strings.Repeat("x", 1<<20))
		}
		return b.String()
	}
	for _, c := range []struct {
		name, text string
		skip       int64
		want       string
	}{
		{"none", "", 0, "EOF"},
		{"a full one", users(0, 1000), 0, "1000 EOF"},
		{"one more", users(0, 1001), 0, "1000 1 EOF"},
		{"large entities", large(5), 0, "2 2 1 EOF"},
		{"some are skipped", users(0, 2500), 1200, "1000 300 EOF"},
		{"all are skipped", users(0, 10), 10, "EOF"},
		{"too many are skipped", users(0, 10), 11, "holds 10 entities, fewer than the 11 that are stored of this import"},
		{"a mistake", users(0, 1500) + "{}\n" + users(0, 1500), 0, "1000 line 1501: uid is missing"},
		{"a mistake among those that are skipped", "{}\n", 1, "line 1: uid is missing"},
	} {
		in := &input{format: formatNDJSON, r: strings.NewReader(c.text)}
		r, err := in.entities()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for l := range in.lots(t.Context(), r, c.skip) {
			if l.err == nil {
				got = append(got, fmt.Sprint(len(l.entities)))
			} else {
				got = append(got, l.err.Error())
			}
		}
		if s := strings.Join(got, " "); s != c.want {
			t.Errorf("%s: %s, want %s", c.name, s, c.want)
		}
	}

	synctest.Test(t, func(t *testing.T) {
		text := users(0, 20_000)
		in := &input{format: formatNDJSON, r: strings.NewReader(text)}
		r, err := in.entities()
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		lots := in.lots(ctx, r, 0)
		<-lots
		synctest.Wait() // nobody receives the next lot
		if share := float64(in.read.Load()) / float64(len(text)); share > 0.15 {
			t.Errorf("%.0f %% of the file are read to send 5 %%", 100*share)
		}
		cancel()
		for range lots {
		}
	})
}

func TestProgress(t *testing.T) {
	for live, want := range map[bool]string{
		false: "500 entities sent, 50 % of the file, 100/s\na note\n1,200 entities sent, 100 % of the file\n",
		true: "\r100 entities sent, 10 % of the file\r200 entities sent, 20 % of the file, 100/s\r300 entities sent, 30 % of the file, 100/s" +
			"\r400 entities sent, 40 % of the file, 100/s\r500 entities sent, 50 % of the file, 100/s\r600 entities sent, 60 % of the file, 100/s" +
			"\r" + strings.Repeat(" ", 42) + "\ra note\n\r1,200 entities sent, 100 % of the file",
	} {
		synctest.Test(t, func(t *testing.T) {
			var out bytes.Buffer
			p := newProgress(&console{err: &out, live: live})
			for n := int64(1); n <= 6; n++ {
				time.Sleep(time.Second)
				p.moved(100*n, n, 10)
				p.moved(100*n, n, 10) // right after the other, so no line is printed
			}
			p.note("a note")
			time.Sleep(time.Minute)
			p.moved(1200, 12, 10)
			if out.String() != want {
				t.Errorf("live %v:\n%q\nwant\n%q", live, out.String(), want)
			}
		})
	}
	for n, want := range map[int64]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567", -1000: "-1,000", -100: "-100"} {
		if got := thousands(n); got != want {
			t.Errorf("%d is %s, want %s", n, got, want)
		}
	}
	var none *progress
	none.moved(1, 1, 1)
	none.note("x")
	none.clear()
}
