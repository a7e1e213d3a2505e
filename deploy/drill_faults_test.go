package deploy

import (
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/engine"
)

// faults are the faults by the names of their alerts.
func (d *drill) faults() map[string]fault {
	all := map[string]fault{}
	for _, some := range []map[string]fault{d.serverFaults(), d.loadFaults(), d.logFaults(), d.signingFaults(), d.policyFaults(), d.callerFaults(), d.upkeepFaults(), d.outputFaults()} {
		maps.Copy(all, some)
	}
	return all
}

func (d *drill) must(err error) {
	d.t.Helper()
	if err != nil {
		d.t.Error(err)
	}
}

// between cuts server one off from Postgres.
func (d *drill) between() (cut, mend func()) {
	w := d.world
	return func() { w.proxy.Refuse(true); w.proxy.Cut() }, func() { w.proxy.Refuse(false) }
}

func (d *drill) serverFaults() map[string]fault {
	w := d.world
	cut, mend := d.between()
	return map[string]fault{
		"CedarpostNoServerReady": {
			what: "Postgres is stopped (`pg_ctl stop -m immediate`).", done: "Postgres is started again.", on: "one",
			make: func() { d.must(w.pg.Kill()) }, undo: func() { d.must(w.pg.Restart(context.Background())) },
		},
		"CedarpostDown": {
			what: "Server two is killed (`kill -9`).", done: "It is started again.", on: "two",
			make: func() { d.must(w.two.cmd.Process.Kill()); <-w.two.dead }, undo: func() { w.start(w.two) },
		},
		"CedarpostNotReady": {
			what: "The network between server one and Postgres is cut. Server two goes on.", done: "The network is back.", on: "one",
			make: cut, undo: mend,
		},
		"CedarpostCallsFail": {
			what: "The network between server one and Postgres is cut, and callers keep asking both servers.", done: "The network is back.", on: "one",
			make: cut, undo: mend,
		},
		"CedarpostStandbyFails": {
			what: "The standby that server one reads from is stopped.", done: "The standby is started again.", on: "one",
			make: func() { d.must(w.standby.Stop()) }, undo: func() { d.must(w.standby.Restart(context.Background())) },
		},
	}
}

func (d *drill) loadFaults() map[string]fault {
	w := d.world
	var stop func()
	slow := func() { w.proxy.Delay(func() time.Duration { return 300 * time.Millisecond }) }
	quick := func() { w.proxy.Delay(nil) }
	return map[string]fault{
		"CedarpostSlow": {
			what: "Each answer of Postgres to server one takes 300 ms longer.", done: "The network is quick again.", on: "one", make: slow, undo: quick,
		},
		"CedarpostDecisionsWait": {
			what: "One caller keeps 300 calls in flight on server one (`--max-decisions 32`), and each answer of Postgres takes 300 ms longer.",
			done: "The caller is stopped, and the network is quick again.", on: "one",
			make: func() {
				slow()
				key, client := w.key("noisy"), w.newClient()
				stop = w.while(300, 0, func(ctx context.Context) { w.ask(ctx, client, w.one, key, "42") })
			},
			undo: func() { stop(); quick() },
		},
		"CedarpostCostlyCallsWait": {
			what: "A bundle with 90 costly policies is published, and one caller asks about it with 64 calls in flight.", done: "The caller is stopped.", on: "two",
			make: func() { stop = d.costly(90, 64, 0) }, undo: func() { stop() },
		},
		"CedarpostTooCostly": {
			what: "The bundle gets 400 costly policies, and one caller asks about it.", done: "The caller is stopped.", on: "two",
			make: func() { stop = d.costly(400, 1, time.Second) }, undo: func() { stop() },
		},
		"CedarpostLargeLoads": {
			what: "A user is put into three roles, each in 200 roles with names of 1 KB. A caller asks about the user on server two, which has no cache (`--cache-mib 0`).",
			done: "The caller is stopped.", on: "two",
			make: func() {
				d.large()
				stop = w.while(2, 100*time.Millisecond, func(ctx context.Context) {
					post(ctx, w.client, "https://"+w.two.decision+"/cedarpost.v1.AuthorizationService/Authorize", w.token,
						`{"principal": {"type": "Shop::User", "id": "large"}, "action": {"type": "Shop::Action", "id": "ViewOrder"}, "resource": {"type": "Shop::Order", "id": "42"}, "context": {"mfa": true}}`)
				})
			},
			undo: func() { stop() },
		},
		"CedarpostConnectionsRefused": {
			what: "Two callers take all connections that the decision plane of server one may have (`--max-connections 60`), and a third one connects.",
			done: "The two callers close theirs.", on: "one",
			make: func() {
				var clients []*http.Client
				for _, name := range []string{"first", "second"} {
					key := w.key(name)
					for range 30 {
						c := w.newClient()
						clients = append(clients, c)
						w.ask(context.Background(), c, w.one, key, "42")
					}
				}
				more := w.while(1, 100*time.Millisecond, func(ctx context.Context) {
					c := w.newClient()
					w.ask(ctx, c, w.one, w.token, "42")
					c.CloseIdleConnections()
				})
				stop = func() {
					more()
					for _, c := range clients {
						c.CloseIdleConnections()
					}
				}
			},
			undo: func() { stop() },
		},
	}
}

// costly publishes a bundle with n policies that take long, and asks about it on server two.
func (d *drill) costly(n, calls int, pause time.Duration) (stop func()) {
	w := d.world
	var text strings.Builder
	for i := range n {
		fmt.Fprintf(&text, "@id(\"p%d\") forbid (principal is Greedy::User, action, resource) when { context.s like \"*%sb\" };\n", i, strings.Repeat("a", 280))
	}
	d.bundle("greedy", map[string]string{
		"schema.cedarschema": `namespace Greedy { entity User; entity Doc; action Read appliesTo { principal: [User], resource: [Doc], context: { s: String } }; }`,
		"policies.cedar":     text.String(),
	})
	body := fmt.Sprintf(`{"principal": {"type": "Greedy::User", "id": "u"}, "action": {"type": "Greedy::Action", "id": "Read"}, "resource": {"type": "Greedy::Doc", "id": "d"}, "context": {"s": %q}}`,
		strings.Repeat("a", engine.MaxStringBytes))
	client := w.newClient()
	return w.while(calls, pause, func(ctx context.Context) {
		post(ctx, client, "https://"+w.two.decision+"/cedarpost.v1.AuthorizationService/Authorize", w.token, body)
	})
}

// bundle publishes a bundle.
func (d *drill) bundle(name string, files map[string]string, args ...string) {
	d.t.Helper()
	dir := d.world.file("bundles/" + name)
	d.must(os.MkdirAll(dir, 0o700))
	for file, text := range files {
		write(d.t, dir+"/"+file, text)
	}
	d.world.run(append([]string{"apply", dir, "--allow-breaking"}, args...)...)
}

// large stores a user with many large ancestors.
func (d *drill) large() {
	var list []string
	var roles []string
	for i := range 3 {
		var parents []string
		for k := range 200 {
			parents = append(parents, fmt.Sprintf(`{"type": "Shop::Role", "id": "%d-%d-%s"}`, i, k, strings.Repeat("r", 1000)))
		}
		roles = append(roles, fmt.Sprintf(`{"type": "Shop::Role", "id": "large%d"}`, i))
		list = append(list, fmt.Sprintf(`{"uid": %s, "attrs": {}, "parents": [%s]}`, roles[i], strings.Join(parents, ", ")))
	}
	list = append(list, fmt.Sprintf(`{"uid": {"type": "Shop::User", "id": "large"}, "attrs": {"region": "eu", "suspended": false}, "parents": [%s]}`, strings.Join(roles, ", ")))
	write(d.t, d.world.file("large.json"), "["+strings.Join(list, ",\n")+"]")
	d.world.run("entities", "import", d.world.file("large.json"))
}

func (d *drill) logFaults() map[string]fault {
	w := d.world
	var conn *pgx.Conn // the collection of garbage would close it
	lock := func() {
		conn = w.session()
		_, err := conn.Exec(context.Background(), "set application_name = 'a migration by hand'; begin; lock table decisions in access exclusive mode")
		d.must(err)
	}
	unlock := func() {
		w.sql("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'a migration by hand'")
		_ = conn.Close(context.Background())
	}
	report := func(what string) {
		status, text := post(context.Background(), w.client, "https://"+w.two.decision+"/cedarpost.v1.AuthorizationService/ReportReuse", w.token,
			fmt.Sprintf(`{"reportId": %q, %s}`, uuid.NewString(), what))
		if status != http.StatusOK {
			d.t.Error(text)
		}
	}
	now := time.Now().UTC().Format(time.RFC3339)
	return map[string]fault{
		"CedarpostNotRecorded": {
			what: "A session locks the table `decisions`, so that commits to the log take longer than 5 s.", done: "The session is ended (`pg_terminate_backend`).",
			on: "one", make: lock, undo: unlock,
		},
		"CedarpostDecisionsAtRisk": {
			what: "The table `decisions` is locked again, and callers ask server two, which is in buffered mode.", done: "The session is ended.", on: "two", make: lock, undo: unlock,
		},
		"CedarpostReuseLost": {
			what: "A caller reports that it lost count of three uses.", done: "Nothing: it is over by itself.", on: "two",
			make: func() { report(`"lost": 3`) }, undo: func() {},
		},
		"CedarpostFailOpen": {
			what: "A caller reports that it let two checks through without an answer.", done: "Nothing: it is over by itself.", on: "two",
			make: func() {
				report(fmt.Sprintf(`"failOpens": [{"principal": {"type": "Shop::User", "id": "alice"}, "action": {"type": "Shop::Action", "id": "ViewOrder"}, "resource": {"type": "Shop::Order", "id": "42"}, "reason": "the shop window", "code": "unavailable", "count": 2, "first": %[1]q, "last": %[1]q}]`, now))
			},
			undo: func() {},
		},
	}
}

func (d *drill) signingFaults() map[string]fault {
	w := d.world
	away := func(yes bool) {
		for _, name := range []string{"one", "two"} {
			if yes {
				d.must(os.Rename(w.file(name), w.file(name+".away")))
			} else {
				d.must(os.Rename(w.file(name+".away"), w.file(name)))
			}
		}
	}
	return map[string]fault{
		"CedarpostLogNotSigned": {
			what: "The folders with the checkpoint files of both servers are moved away.", done: "They are moved back.", on: "one",
			make: func() { away(true) }, undo: func() { away(false) },
		},
		"CedarpostSigningFails": {
			what: "As for CedarpostLogNotSigned, the folders with the checkpoint files are moved away.", done: "The folders are moved back.",
			make: func() { away(true) }, undo: func() { away(false) },
		},
		"CedarpostLogContradicted": {
			what: "Both servers are stopped, a checkpoint of a longer log, signed with the key of the log, is added to the checkpoint file of server one, as after a restore of an older backup, and server one is started again.",
			done: "An operator states what was lost (`cedarpost audit truncate --confirm`), and server one is started again, because server two may sign now.", on: "one",
			make: func() {
				d.stop(w.two)
				d.stop(w.one)
				d.longerLog()
				w.start(w.one)
			},
			undo: func() {
				out := w.run("audit", "truncate", "--database-url", w.pg.URL(), "--audit-key-file", w.file("audit.key"), "--audit-checkpoint-file", w.file("one/checkpoints"),
					"--operator", "Ann Smith", "--reason", "restore of last night's backup", "--confirm")
				d.results["CedarpostLogContradicted"].looked += "$ cedarpost audit truncate … --confirm\n" + w.scrub(out)
				w.start(w.two)
				d.stop(w.one)
				w.start(w.one)
			},
		},
		"CedarpostForeignCheckpoints": {
			what: "A checkpoint of a longer log, by another key, is put into the database, and server one and two are started again one after the other.", done: "Nothing: it is over by itself. In earnest, the password of the login is changed.",
			make: func() {
				w.sql("insert into checkpoints (origin, size, note) select 'audit.example.org/cedarpost', max(size) + 1000000, 'by another key' from checkpoints")
				d.stop(w.one)
				w.start(w.one)
				d.stop(w.two) // server one takes over the signing
				w.start(w.two)
			},
			undo: func() {},
		},
	}
}

func (d *drill) stop(n *node) {
	d.must(n.cmd.Process.Signal(syscall.SIGTERM))
	<-n.dead
}

// longerLog adds a checkpoint of a longer log to the checkpoint file of server one.
func (d *drill) longerLog() {
	w := d.world
	key, err := auditlog.ReadKey(w.file("audit.key"))
	d.must(err)
	var last auditlog.Checkpoint
	for _, name := range []string{"one", "two"} { // either may have signed last
		newest, err := auditlog.LastCheckpoint(w.file(name+"/checkpoints"), "audit.example.org/cedarpost", func(auditlog.Checkpoint) bool { return true })
		d.must(err)
		if newest.Size > last.Size {
			last = newest
		}
	}
	last.Size += 1000
	last.Root = sha256.Sum256([]byte("a longer log"))
	text, err := last.Sign(key)
	d.must(err)
	file, err := os.OpenFile(w.file("one/checkpoints"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	d.must(err)
	_, err = file.WriteString(string(text) + "\n")
	d.must(err)
	d.must(file.Close())
}

func (d *drill) policyFaults() map[string]fault {
	w := d.world
	revise := func(edit string) {
		w.sql(edit + `; update revision set n = n + 1; insert into revisions (n, caller) select n, 'a newer server' from revision;
			insert into revision_entries select n, 'bundle', '', 'shop' from revision`)
	}
	return map[string]fault{
		"CedarpostPolicyNotApplied": {
			what: "A policy of the bundle `shop` is written into the database that this version does not compile, as a newer server could.",
			done: "The policy is taken back in the same way.", on: "one",
			make: func() {
				revise(`update policies set text = replace(text, 'permit (', 'permit newly (') where bundle = 'shop' and until is null`)
			},
			undo: func() {
				revise(`update policies set text = replace(text, 'permit newly (', 'permit (') where bundle = 'shop' and until is null`)
			},
		},
		"CedarpostBreakGlass": {
			what: "The bundle `shop` is frozen, and published past the freeze.", done: "The bundle is unfrozen.", on: "two",
			make: func() {
				w.run("freeze", "shop", "--reason", "end of the quarter")
				dir := w.file("bundles/shop")
				d.must(os.MkdirAll(w.file("bundles"), 0o700))
				d.must(os.CopyFS(dir, os.DirFS("../policies/shop")))
				file := dir + "/view.cedar"
				write(d.t, file, string(read(d.t, file))+"\n// A comment.\n")
				w.run("apply", dir, "--break-glass", "customers cannot pay, ticket 4712")
			},
			undo: func() { w.run("unfreeze", "shop", "--reason", "it was right") },
		},
	}
}

func (d *drill) callerFaults() map[string]fault {
	w := d.world
	var stop func()
	return map[string]fault{
		"CedarpostAuthenticationFails": {
			what: "A caller goes on to ask server two with a key that it does not know, up to 40 times a second.", done: "The caller is stopped.", on: "two",
			make: func() {
				_, key := access.NewKey("noisy", nil)
				client := w.newClient()
				stop = w.while(8, 200*time.Millisecond, func(ctx context.Context) { w.ask(ctx, client, w.two, key, "42") })
			},
			undo: func() { stop() },
		},
		"CedarpostRightsRefused": {
			what: "A caller whose key may only ask goes on to list all keys on server two, up to ten times a second.", done: "The caller is stopped.", on: "two",
			make: func() {
				key, client := w.key("curious"), w.newClient()
				stop = w.while(2, 200*time.Millisecond, func(ctx context.Context) {
					post(ctx, client, "https://"+w.two.admin+"/cedarpost.v1.AccessService/ListKeys", key, "{}")
				})
			},
			undo: func() { stop() },
		},
	}
}

// outputFaults are about what servers send and write to others.
func (d *drill) outputFaults() map[string]fault {
	w := d.world
	var stop func()
	restart := func(n *node, telemetry ...string) {
		d.stop(n)
		n.telemetry = telemetry
		w.start(n)
	}
	return map[string]fault{
		"CedarpostTelemetryFails": {
			what: "Server one is started again with `OTEL_EXPORTER_OTLP_ENDPOINT` of a port that nothing listens on. It sends each second.",
			done: "It is started again without.", on: "one",
			make: func() {
				restart(w.one, "OTEL_EXPORTER_OTLP_ENDPOINT=http://"+freePort(d.t), "OTEL_BSP_SCHEDULE_DELAY=1000", "OTEL_METRIC_EXPORT_INTERVAL=1000")
			},
			undo: func() { restart(w.one) },
		},
		"CedarpostLogLinesLost": {
			what: "The reader of the pipe that is stderr of server two is closed. Each second, SIGHUP makes the server write lines.", done: "The server is started again, with a pipe that is read.", on: "two",
			make: func() {
				d.must(w.two.reader.Close())
				stop = w.while(1, time.Second, func(context.Context) { d.must(w.two.cmd.Process.Signal(syscall.SIGHUP)) })
			},
			undo: func() { stop(); restart(w.two) },
		},
	}
}

func (d *drill) upkeepFaults() map[string]fault {
	w := d.world
	secret := w.file("mask.key")
	at := func(ago time.Duration) { d.must(os.Chtimes(secret, time.Time{}, time.Now().Add(-ago))) }
	clock := func(n *node, seconds string) func() { return func() { write(d.t, n.clock, seconds+"\n") } }
	return map[string]fault{
		"CedarpostCertificateEnds": {
			what: "Server one gets a certificate that ends in three days.", done: "It gets one that lives for 90 days.", on: "one",
			make: func() { w.certificate("one", 72*time.Hour) }, undo: func() { w.certificate("one", 90*24*time.Hour) },
		},
		"CedarpostCertificateNotUsed": {
			what: "The file of the certificate of server two is replaced by something else.", done: "A certificate and its key are written.", on: "two",
			make: func() { write(d.t, w.file("two.pem"), "not a certificate\n") }, undo: func() { w.certificate("two", 90*24*time.Hour) },
		},
		"CedarpostSecretOld": {
			what: "The file of the mask key is made 400 days old (`touch`).", done: "It is written anew.", on: "one",
			make: func() { at(400 * 24 * time.Hour) }, undo: func() { at(0) },
		},
		"CedarpostClocksDiffer": {
			what: "The clock of server two is set 4 s ahead.", done: "The clock is set right.", on: "two", make: clock(w.two, "4"), undo: clock(w.two, "0"),
		},
		"CedarpostClockSet": {
			what: "The clock of server one is set 90 s back.", done: "The clock is set right.", on: "one", make: clock(w.one, "-90"), undo: clock(w.one, "0"),
		},
		"CedarpostBackgroundFails": {
			what: "A function that the sweep of history needs is renamed by hand.", done: "It gets its name back (after the next alert).",
			make: func() { w.sql("alter function raise_oldest(interval) rename to raise_oldest_away") }, undo: func() {},
		},
		"CedarpostBackgroundStalls": {
			what: "As for CedarpostBackgroundFails, a function that the sweep of history needs has another name.", done: "The function gets its name back.", on: "one",
			make: func() {}, undo: func() { w.sql("alter function raise_oldest_away(interval) rename to raise_oldest") },
		},
	}
}
