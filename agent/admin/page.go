// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"bytes"
	"embed"
	"fmt"
	"html/template"
	"net/http"
	"os"
	"time"

	"weir/p2p"
	"weir/proxy/registry"
)

//go:embed page
var pageFiles embed.FS

var pageTemplate = template.Must(template.New("page.html").Funcs(template.FuncMap{
	"bytes":    BytesText,
	"percent":  PercentText,
	"traffic":  trafficOf,
	"seconds":  SecondsText,
	"host":     PeerText,
	"registry": RegistryText,
}).ParseFS(pageFiles, "page/page.html"))

func (t traffic) minus(o traffic) traffic {
	return traffic{t.BytesFromStore - o.BytesFromStore, t.BytesFromPeers - o.BytesFromPeers, t.BytesFromUpstream - o.BytesFromUpstream}
}

// Saved are the bytes that came from no registry, All those that came at all.
func (t traffic) Saved() int64 { return t.BytesFromStore + t.BytesFromPeers }
func (t traffic) All() int64   { return t.BytesFromStore + t.BytesFromPeers + t.BytesFromUpstream }

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

func (s *Server) page(w http.ResponseWriter, r *http.Request) {
	d := pageData{Version: s.o.Version, Started: s.started, Uptime: time.Since(s.started).Round(time.Second)}
	d.Host, _ = os.Hostname()
	if s.o.Peers != nil {
		p := s.o.Peers.Status()
		d.Peers = &p
	}
	if r.URL.Query().Has("cluster") {
		c := s.Cluster()
		d.Cluster, d.Figures = &c, c.Figures
	} else {
		d.Node, d.Figures = &pageNode{Status: s.Status()}, s.figures().Figures
		pulls := s.o.Registry.Pulls()
		for _, p := range pulls[:min(20, len(pulls))] {
			d.Node.Pulls = append(d.Node.Pulls, pagePull{p})
		}
	}
	for _, r := range d.Figures.Registries {
		d.Registries = append(d.Registries, pageRegistry{r})
	}
	d.Total = trafficOf(d.Figures.Registries)
	now := time.Now()
	d.Since = stepStart(stepOf(now) - historySteps + 1).Local()
	d.Bars, d.Highest = bars(d.History, now)
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, d); err != nil {
		s.o.Log.Error("the page can't be made", "err", err)
		http.Error(w, "the page can't be made; see the agent's log", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	_, _ = w.Write(b.Bytes())
}
