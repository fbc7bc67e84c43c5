// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"embed"
	"fmt"
	"html/template"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"time"

	"weir/p2p"
	"weir/proxy/registry"
)

//go:embed page
var pageFiles embed.FS

var pageTemplate = template.Must(template.New("page.html").Funcs(template.FuncMap{
	"bytes":   BytesText,
	"percent": PercentText,
	"traffic": trafficOf,
	"seconds": SecondsText,
	"host":    PeerText,
}).ParseFS(pageFiles, "page/page.html"))

// BytesText is a number of bytes for people.
func BytesText(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, i := float64(n)/1024, 0
	for v >= 1024 && i < len(units)-1 {
		v, i = v/1024, i+1
	}
	return fmt.Sprintf("%.1f %ciB", v, units[i])
}

// PercentText is part of whole in percent, for people: a dash of nothing, and
// neither 0 nor 100 of what is a little more or less.
func PercentText(part, whole int64) string {
	switch p := 100 * float64(part) / float64(whole); {
	case whole <= 0:
		return "–"
	case part > 0 && p < 1:
		return "<1 %"
	case part < whole && p > 99:
		return ">99 %"
	default:
		return fmt.Sprintf("%.0f %%", p)
	}
}

// SecondsText is a time for people.
func SecondsText(s float64) string {
	switch {
	case s <= 0:
		return "–"
	case s < 0.05:
		return "<0.1 s"
	case s < 100:
		return fmt.Sprintf("%.1f s", s)
	}
	return (time.Duration(s) * time.Second).String()
}

// AloneText is how long a pull would have taken from its registry alone. It is
// empty when that isn't known, and when that was the way it went.
func AloneText(p registry.Pull) string {
	if p.UpstreamSeconds <= 0 || p.BytesFromStore+p.BytesFromPeers == 0 {
		return ""
	}
	return "about " + SecondsText(p.UpstreamSeconds)
}

// PeerText is a peer's address without the port, which is that of a connection.
func PeerText(address string) string {
	if host, _, err := net.SplitHostPort(address); err == nil {
		return host
	}
	return address
}

const (
	historyStep  = 15 * time.Minute
	historySteps = 96
)

// traffic is what runtimes have got, by where it came from.
type traffic struct {
	BytesFromStore    int64 `json:"bytes_from_store"`
	BytesFromPeers    int64 `json:"bytes_from_peers"`
	BytesFromUpstream int64 `json:"bytes_from_upstream"`
}

func (t *traffic) add(o traffic) {
	t.BytesFromStore += o.BytesFromStore
	t.BytesFromPeers += o.BytesFromPeers
	t.BytesFromUpstream += o.BytesFromUpstream
}

func (t traffic) minus(o traffic) traffic {
	return traffic{t.BytesFromStore - o.BytesFromStore, t.BytesFromPeers - o.BytesFromPeers, t.BytesFromUpstream - o.BytesFromUpstream}
}

// Saved are the bytes that came from no registry, All those that came at all.
func (t traffic) Saved() int64 { return t.BytesFromStore + t.BytesFromPeers }
func (t traffic) All() int64   { return t.BytesFromStore + t.BytesFromPeers + t.BytesFromUpstream }

func trafficOf(all []registry.Stats) (t traffic) {
	for _, r := range all {
		t.add(traffic{r.BytesFromStore, r.BytesFromPeers, r.BytesFromUpstream})
	}
	return t
}

// Step is what runtimes got in a quarter of an hour.
type Step struct {
	At time.Time `json:"at"` // its beginning
	traffic
}

// stepOf is the number of a time's step since the Unix epoch.
func stepOf(t time.Time) int64 { return t.Unix() / int64(historyStep/time.Second) }

func stepStart(n int64) time.Time { return time.Unix(n*int64(historyStep/time.Second), 0).UTC() }

// history is the traffic of the last day.
type history struct {
	mu    sync.Mutex
	steps [historySteps]traffic
	last  int64 // number of the latest step since the Unix epoch
	seen  traffic
}

// add takes in how much it has been by now.
func (h *history) add(now time.Time, total traffic) {
	h.mu.Lock()
	defer h.mu.Unlock()
	step := stepOf(now)
	for n := max(h.last+1, step-historySteps+1); n <= step; n++ {
		h.steps[n%historySteps] = traffic{}
	}
	h.last = max(h.last, step)
	h.steps[h.last%historySteps].add(total.minus(h.seen))
	h.seen = total
}

// list returns the steps in which there was something, the oldest first.
func (h *history) list() (steps []Step) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range int64(historySteps) {
		n := h.last + 1 - historySteps + i
		if t := h.steps[(n+historySteps)%historySteps]; t != (traffic{}) {
			steps = append(steps, Step{stepStart(n), t})
		}
	}
	return steps
}

// bar is a part of a bar of the page's picture.
type bar struct {
	Class, Title string
	X            int
	Y, Height    float64
}

// bars draws the last day in a box of 960 by 100, and says what the highest are.
func bars(steps []Step, now time.Time) (all []bar, highest int64) {
	oldest := stepOf(now) - historySteps + 1
	for _, s := range steps {
		highest = max(highest, s.All())
	}
	for _, s := range steps {
		i, y := stepOf(s.At)-oldest, 100.0
		if i < 0 || i >= historySteps {
			continue
		}
		for _, part := range []struct {
			class, from string
			n           int64
		}{{"store", "the store", s.BytesFromStore}, {"peers", "peers", s.BytesFromPeers}, {"upstream", "registries", s.BytesFromUpstream}} {
			if part.n <= 0 {
				continue
			}
			height := 96 * float64(part.n) / float64(highest)
			y -= height
			all = append(all, bar{part.class, fmt.Sprintf("%s: %s from %s", s.At.Local().Format("15:04"), BytesText(part.n), part.from), int(10*i + 1), y, height})
		}
	}
	return all, highest
}

// pageData is what the page shows: nothing that isn't in /api/.
type pageData struct {
	Host    string
	Version string
	Started time.Time
	Uptime  time.Duration
	// Peers is nil without a swarm key.
	Peers *p2p.Status
	// What both pages have, of the node or of the cluster.
	Figures
	Total      traffic
	Since      time.Time // when the picture begins
	Bars       []bar
	Highest    int64
	Registries []pageRegistry
	// Node is nil on the page of the cluster, and Cluster on the node's.
	Node    *pageNode
	Cluster *Cluster
}

type pageNode struct {
	Status
	Pulls []pagePull
}

type pageRegistry struct{ registry.Stats }

func (r pageRegistry) Name() string { return RegistryText(r.Registry) }

func (r pageRegistry) Asked() int64 { return r.Hits + r.Misses }

type pagePull struct{ registry.Pull }

func (p pagePull) Name() string { return PullName(p.Pull) }

func (p pagePull) Alone() string { return AloneText(p.Pull) }

func (p pagePull) Running() bool { return p.Ended.IsZero() }

func (p pagePull) Max() int64 { return max(p.Size, 1) }

// RegistryText is what people call a registry.
func RegistryText(host string) string {
	if host == registry.DockerHub {
		return DefaultMirror
	}
	return host
}

// PullName is the name of a pull's image, as far as it is known.
func PullName(p registry.Pull) string {
	name := RegistryText(p.Registry) + "/" + p.Repository
	switch {
	case p.Reference == "":
	case len(p.Reference) > 7 && p.Reference[:7] == "sha256:":
		name += "@" + p.Reference[:min(19, len(p.Reference))]
	default:
		name += ":" + p.Reference
	}
	return name
}

func (a *Agent) page(w http.ResponseWriter, r *http.Request) {
	d := pageData{Version: a.conf.Version, Started: a.started, Uptime: time.Since(a.started).Round(time.Second)}
	d.Host, _ = os.Hostname()
	if a.peers != nil {
		s := a.peers.Status()
		d.Peers = &s
	}
	if r.URL.Query().Has("cluster") {
		c := a.Cluster()
		d.Cluster, d.Figures = &c, c.Figures
	} else {
		d.Node, d.Figures = &pageNode{Status: a.Status()}, a.figures().Figures
		pulls := a.registry.Pulls()
		for _, p := range pulls[:min(20, len(pulls))] {
			d.Node.Pulls = append(d.Node.Pulls, pagePull{p})
		}
	}
	for _, s := range d.Figures.Registries {
		d.Registries = append(d.Registries, pageRegistry{s})
	}
	d.Total = trafficOf(d.Figures.Registries)
	now := time.Now()
	d.Since = stepStart(stepOf(now) - historySteps + 1).Local()
	d.Bars, d.Highest = bars(d.History, now)
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, d); err != nil {
		a.log.Error("the page can't be made", "err", err)
		http.Error(w, "the page can't be made; see the agent's log", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	_, _ = w.Write(b.Bytes())
}

// guarded refuses what browsers should not do here for others. A page of
// somebody else may give its own name this node's address (DNS rebinding), and
// would then read what is here: on loopback only requests for loopback are
// answered.
func guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if local, ok := loopback(r); ok && !loopbackHost(r.Host) {
			http.Error(w, "this address answers for itself only: use http://"+local, http.StatusMisdirectedRequest)
			return
		}
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		next.ServeHTTP(w, r)
	})
}

// loopback says whether a request came by the loopback interface, and where.
func loopback(r *http.Request) (local string, ok bool) {
	addr, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	if addr == nil || !addr.IP.IsLoopback() {
		return "", false
	}
	return addr.String(), true
}

func loopbackHost(hostport string) bool {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = hostport
	}
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.IsLoopback()
}
