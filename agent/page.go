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

	"weir/proxy/registry"
)

//go:embed page
var pageFiles embed.FS

var pageTemplate = template.Must(template.New("page.html").Funcs(template.FuncMap{
	"bytes":   BytesText,
	"percent": percentText,
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

// percentText is part of whole in percent, for people.
func percentText(part, whole int64) string {
	if whole <= 0 {
		return "–"
	}
	return fmt.Sprintf("%.0f %%", 100*float64(part)/float64(whole))
}

const (
	historyStep  = 15 * time.Minute
	historySteps = 96
)

// traffic is what runtimes have got, by where it came from.
type traffic struct{ store, peers, upstream int64 }

func (t traffic) sum() int64 { return t.store + t.peers + t.upstream }

func trafficOf(all []registry.Stats) (t traffic) {
	for _, r := range all {
		t.store += r.BytesFromStore
		t.peers += r.BytesFromPeers
		t.upstream += r.BytesFromUpstream
	}
	return t
}

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
	step := now.UnixNano() / int64(historyStep)
	for n := max(h.last+1, step-historySteps+1); n <= step; n++ {
		h.steps[n%historySteps] = traffic{}
	}
	h.last = max(h.last, step)
	s := &h.steps[h.last%historySteps]
	s.store += total.store - h.seen.store
	s.peers += total.peers - h.seen.peers
	s.upstream += total.upstream - h.seen.upstream
	h.seen = total
}

// all returns the steps, the oldest first, and when the oldest began.
func (h *history) all() (steps []traffic, since time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range int64(historySteps) {
		steps = append(steps, h.steps[(h.last+1+i)%historySteps])
	}
	return steps, time.Unix(0, (h.last-historySteps+1)*int64(historyStep))
}

// bar is a part of a bar of the page's picture.
type bar struct {
	Class, Title string
	X            int
	Y, Height    float64
}

// bars draws the history in a box of 960 by 100.
func (h *history) bars() (all []bar, highest int64) {
	steps, since := h.all()
	for _, s := range steps {
		highest = max(highest, s.sum())
	}
	if highest == 0 {
		return nil, 0
	}
	for i, s := range steps {
		y := 100.0
		for _, part := range []struct {
			class, from string
			n           int64
		}{{"store", "the store", s.store}, {"peers", "peers", s.peers}, {"upstream", "registries", s.upstream}} {
			if part.n <= 0 {
				continue
			}
			height := 96 * float64(part.n) / float64(highest)
			y -= height
			all = append(all, bar{part.class, fmt.Sprintf("%s: %s from %s", since.Add(time.Duration(i)*historyStep).Format("15:04"), BytesText(part.n), part.from), 10*i + 1, y, height})
		}
	}
	return all, highest
}

// pageData is what the page shows: nothing that isn't in /api/status or
// /api/pulls.
type pageData struct {
	Status
	Host                       string
	Uptime                     time.Duration
	Saved, FromUpstream, Total int64
	Intercepting               int
	Bars                       []bar
	Highest                    int64
	Registries                 []pageRegistry
	Pulls                      []pagePull
}

type pageRegistry struct{ registry.Stats }

func (r pageRegistry) Asked() int64 { return r.Hits + r.Misses }

type pagePull struct{ registry.Pull }

func (p pagePull) Name() string { return PullName(p.Pull) }

func (p pagePull) Running() bool { return p.Ended.IsZero() }

func (p pagePull) Max() int64 { return max(p.Size, 1) }

// PullName is the name of a pull's image, as far as it is known.
func PullName(p registry.Pull) string {
	host := p.Registry
	if host == registry.DockerHub {
		host = "docker.io" // as people call it
	}
	name := host + "/" + p.Repository
	switch {
	case p.Reference == "":
	case len(p.Reference) > 7 && p.Reference[:7] == "sha256:":
		name += "@" + p.Reference[:min(19, len(p.Reference))]
	default:
		name += ":" + p.Reference
	}
	return name
}

func (a *Agent) page(w http.ResponseWriter, _ *http.Request) {
	d := pageData{Status: a.Status(), Uptime: time.Since(a.started).Round(time.Second)}
	d.Host, _ = os.Hostname()
	t := trafficOf(d.Status.Registries)
	a.history.add(time.Now(), t)
	d.Saved, d.FromUpstream, d.Total = t.store+t.peers, t.upstream, t.sum()
	for _, r := range d.Runtimes {
		if r.Reach == ReachIntercepted {
			d.Intercepting++
		}
	}
	for _, r := range d.Status.Registries {
		d.Registries = append(d.Registries, pageRegistry{r})
	}
	pulls := a.registry.Pulls()
	for _, p := range pulls[:min(20, len(pulls))] {
		d.Pulls = append(d.Pulls, pagePull{p})
	}
	d.Bars, d.Highest = a.history.bars()
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

// onLoopback is for what only this node's processes may ask, whatever --admin
// listens on.
func onLoopback(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, ok := loopback(r); !ok {
			http.Error(w, "only to be had on the node itself", http.StatusForbidden)
			return
		}
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
