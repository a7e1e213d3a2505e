package server

import (
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/server/stored"
)

// The names of the reasons why a server is not ready. They are labels of a metric and part of the
// JSON of /readyz. docs/operations.md says what each means.
const (
	reasonStopping    = "stopping"
	reasonDatabase    = "database"
	reasonPartition   = "partition"
	reasonBehind      = "behind"
	reasonPolicy      = "policy"
	reasonLog         = "log"
	reasonCertificate = "certificate"
	reasonClientCA    = "client_ca"
)

var reasonNames = []string{
	reasonStopping, reasonDatabase, reasonPartition, reasonBehind, reasonPolicy, reasonLog, reasonCertificate, reasonClientCA,
}

// reason is why a server is not ready, or what a warning is about. The text is for operators, and
// has nothing that strangers may not read.
type reason struct {
	Name string `json:"name"`
	Text string `json:"text"`
}

// reasons returns all reasons why the server cannot decide now, or why clients cannot reach it. It
// reads only the memory of this process, so every probe may call it.
func (r *readiness) reasons() (list []reason) {
	add := func(name string, err error) {
		if err != nil {
			list = append(list, reason{name, err.Error()})
		}
	}
	if isClosed(r.stopping) {
		list = append(list, reason{reasonStopping, "the server is stopping"})
	}
	list = append(list, r.lastLook().reasons...)
	if _, err := r.follower.Current(); err != nil {
		add(reasonBehind, err)
		if errors.Is(r.follower.Trouble(), stored.ErrCompile) {
			list = append(list, reason{reasonPolicy, "a published bundle does not compile on this server, its log says why"})
		}
	}
	if r.recorder != nil {
		add(reasonLog, r.recorder.Outage())
	}
	if r.cert != nil {
		add(reasonCertificate, r.cert.err())
	}
	if r.clients != nil && r.clients.required {
		add(reasonClientCA, r.clients.err())
	}
	return list
}

// warnings lists problems that need an operator although the server decides. Each begins
// with what it is about, like "signing: ".
func (s *Server) warnings() (list []string) {
	all := append([]string{s.signer.Warning(), s.ready.clock.warning()}, s.ready.lastLook().warnings...)
	if s.cert != nil {
		all = append(all, s.cert.warning())
	}
	if s.clients != nil {
		all = append(all, s.clients.warning())
	}
	if _, trouble := s.cfg.DB.TLSFiles(); trouble != "" {
		all = append(all, "database: "+trouble)
	}
	return slices.DeleteFunc(all, func(w string) bool { return w == "" })
}

// serveHealth adds /livez, /readyz and /startupz. A warning does not make a server unready, because the
// server still decides, and other servers usually have the same problem.
func (s *Server) serveHealth(mux *http.ServeMux) {
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("ok\n"))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		s.health(s.ready.reasons(), "ready").write(w, r)
	})
	// Once it was ok it stays so, so that a probe of the start never restarts a server that has started.
	mux.HandleFunc("GET /startupz", func(w http.ResponseWriter, r *http.Request) {
		reasons := s.ready.reasons()
		if len(reasons) == 0 {
			s.ready.started.Store(true)
		}
		if s.ready.started.Load() {
			reasons = nil
		}
		s.health(reasons, "started").write(w, r)
	})
}

// healthReport is the answer of /readyz and /startupz. Of /startupz, Ready means that the server was ready
// once.
type healthReport struct {
	Ready    bool     `json:"ready"`
	Reasons  []reason `json:"reasons"`
	Warnings []reason `json:"warnings"`
	ok       string   // the word for ready
}

func (s *Server) health(reasons []reason, ok string) healthReport {
	report := healthReport{Ready: len(reasons) == 0, Reasons: append([]reason{}, reasons...), Warnings: []reason{}, ok: ok}
	for _, w := range s.warnings() {
		name, text, _ := strings.Cut(w, ": ")
		report.Warnings = append(report.Warnings, reason{name, text})
	}
	return report
}

// write answers in JSON if the caller asks for it, and in lines of text otherwise.
func (h healthReport) write(w http.ResponseWriter, r *http.Request) {
	var body []byte
	kind := "application/json"
	if r.URL.Query().Get("format") == "json" || strings.Contains(r.Header.Get("Accept"), kind) {
		body, _ = json.Marshal(h) // cannot fail: it has only texts
		body = append(body, '\n')
	} else {
		kind, body = "text/plain; charset=utf-8", []byte(h.text())
	}
	w.Header().Set("Content-Type", kind)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	if !h.Ready {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_, _ = w.Write(body)
}

// text returns a line for each reason and each warning.
func (h healthReport) text() string {
	var b strings.Builder
	if h.Ready {
		b.WriteString(h.ok + "\n")
	}
	for _, r := range h.Reasons {
		b.WriteString("not " + h.ok + ": " + r.Text + "\n")
	}
	for _, w := range h.Warnings {
		b.WriteString("warning: " + w.Name + ": " + w.Text + "\n")
	}
	return b.String()
}

// readyMetrics asks for the reasons once for each scrape, so that its two metrics agree.
type readyMetrics struct {
	ready      *readiness
	is, reason *prometheus.Desc
}

// registerReady adds whether the server is ready, and each reason why it is not.
func registerReady(r prometheus.Registerer, ready *readiness) {
	r.MustRegister(&readyMetrics{
		ready:  ready,
		is:     prometheus.NewDesc("cedarpost_ready", "1 if this server can decide now, else 0. Alert on 0.", nil, nil),
		reason: prometheus.NewDesc("cedarpost_not_ready", "1 for each reason why this server is not ready, else 0.", []string{"reason"}, nil),
	})
}

// Describe implements prometheus.Collector.
func (m *readyMetrics) Describe(out chan<- *prometheus.Desc) {
	out <- m.is
	out <- m.reason
}

// Collect implements prometheus.Collector.
func (m *readyMetrics) Collect(out chan<- prometheus.Metric) {
	reasons := m.ready.reasons()
	number := func(yes bool) float64 {
		if yes {
			return 1
		}
		return 0
	}
	out <- prometheus.MustNewConstMetric(m.is, prometheus.GaugeValue, number(len(reasons) == 0))
	for _, name := range reasonNames {
		is := slices.ContainsFunc(reasons, func(r reason) bool { return r.Name == name })
		out <- prometheus.MustNewConstMetric(m.reason, prometheus.GaugeValue, number(is), name)
	}
}
