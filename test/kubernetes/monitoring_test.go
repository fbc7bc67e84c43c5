// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"weir/test/lab"
)

const monitoring = chart + "/monitoring"

// The rules are ones, and the alerts come when they should.
func TestRules(t *testing.T) {
	promtool := lab.Debian(t, "/usr/bin/promtool", "prometheus")
	for _, args := range [][]string{{"check", "rules", "--lint-fatal", "rules.yaml"}, {"test", "rules", "rules_test.yaml"}} {
		cmd := exec.Command(promtool, args...)
		cmd.Dir = monitoring
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
}

type dashboard struct {
	UID    string
	Panels []struct {
		ID      int
		Title   string
		GridPos struct{ X, Y, W, H int }
		Targets []struct{ Expr string }
	}
}

// The dashboard is one that Grafana reads: JSON, no two panels with one id or
// on one place.
func TestDashboard(t *testing.T) {
	b, err := os.ReadFile(monitoring + "/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var d dashboard
	if err := json.Unmarshal(b, &d); err != nil || d.UID == "" || len(d.Panels) == 0 {
		t.Fatalf("%v, %+v", err, d)
	}
	ids := make(map[int]bool)
	taken := make(map[[2]int]string)
	for _, p := range d.Panels {
		if ids[p.ID] || p.Title == "" || len(p.Targets) == 0 {
			t.Errorf("%+v", p)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" || x > 23 {
					t.Errorf("%q lies over %q", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
	}
}

// prometheus is a real one on a node.
type prometheus struct{ http.Client }

func newPrometheus(t *testing.T, node *lab.Node, config string) *prometheus {
	t.Helper()
	node.WriteFile("/etc/prometheus.yml", config)
	p := &prometheus{}
	p.Transport = &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		return node.Dial(ctx, network, addr)
	}}
	t.Cleanup(p.CloseIdleConnections)
	node.Spawn("prometheus", lab.Debian(t, "/usr/bin/prometheus", "prometheus"), "--config.file=/etc/prometheus.yml", "--storage.tsdb.path=/var/lib/prometheus", "--web.listen-address=127.0.0.1:9090")
	return p
}

func (p *prometheus) get(ctx context.Context, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:9090/api/v1/"+path, nil)
	if err != nil {
		return err
	}
	resp, err := p.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var answer struct {
		Status, Error string
		Data          json.RawMessage
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return err
	}
	if answer.Status != "success" {
		return fmt.Errorf("%s: %s", path, answer.Error)
	}
	return json.Unmarshal(answer.Data, into)
}

// values are those of a query's result that are numbers.
func (p *prometheus) values(ctx context.Context, query string) (values []string, err error) {
	var data struct {
		Result []struct{ Value [2]any }
	}
	err = p.get(ctx, "query?query="+url.QueryEscape(query), &data)
	for _, r := range data.Result {
		if v := fmt.Sprint(r.Value[1]); v != "NaN" {
			values = append(values, v)
		}
	}
	return values, err
}

// Each query of the dashboard and of the rules says something of real agents, to
// a real Prometheus.
func TestQueries(t *testing.T) {
	in := lab.NewInternet(t)
	hub := in.DockerHub()
	hub.Push("library/debian:12", lab.Image{Layers: []int{300_000}, Seed: 1})
	hub.Push("library/debian:13", lab.Image{Layers: []int{300_000}, Seed: 2})
	nodes := []*lab.Node{in.Node(), in.Node()}
	var targets []string
	for _, n := range nodes {
		n.WriteFile("/etc/weir.key", "/key/swarm/psk/1.0.0/\n/base16/\n"+strings.Repeat("5a", 32)+"\n")
		targets = append(targets, n.Addr().String()+":5060")
	}
	nodes[1].Docker().Pull("debian:12") // before weir: it will be passed through
	for _, n := range nodes {
		n.Spawn("weir", lab.Weir(t), "agent", "--cgroup", n.Cgroup(), "--admin", "0.0.0.0:5060", "--swarm-key", "/etc/weir.key", "--peer", nodes[0].Addr().String())
		if err := lab.Eventually(nil, func(context.Context) error {
			_, err := n.Output(lab.Weir(t), "status", "--admin", "127.0.0.1:5060")
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	docker := nodes[0].Docker()
	docker.Pull("debian:12") // the registry's series begin
	rules, err := filepath.Abs(monitoring + "/rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	p := newPrometheus(t, nodes[0], fmt.Sprintf(`
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [%s]
scrape_configs:
  - job_name: weir
    static_configs: [{targets: ["%s"]}]
`, rules, strings.Join(targets, `", "`)))
	says := func(query string) {
		t.Helper()
		var got []string
		if err := lab.Eventually(nil, func(ctx context.Context) (err error) {
			if got, err = p.values(ctx, query); err == nil && len(got) == 0 {
				err = fmt.Errorf("it says nothing")
			}
			return err
		}); err != nil {
			t.Errorf("%s: %v", query, err)
		}
		t.Logf("%s: %v", query, got)
	}
	says("weir_registry_bytes_total")
	docker.Pull("debian:13")

	b, err := os.ReadFile(monitoring + "/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var d dashboard
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	grafana := strings.NewReplacer("$instance", ".*", "$__range", "5m", "$__rate_interval", "5m")
	for _, panel := range d.Panels {
		for _, target := range panel.Targets {
			says(grafana.Replace(target.Expr))
		}
	}
	var loaded struct {
		Groups []struct {
			Rules []struct{ Name, Type, Query, Health, LastError string }
		}
	}
	if err := p.get(t.Context(), "rules", &loaded); err != nil || len(loaded.Groups) == 0 {
		t.Fatalf("%v, %+v", err, loaded)
	}
	for _, r := range loaded.Groups[0].Rules {
		if r.Type == "recording" {
			says(r.Name)
			continue
		}
		// What an alert compares has to be there, though it isn't as bad.
		compared := regexp.MustCompile(`^(.*?) (==|>) [0-9]+`).FindStringSubmatch(r.Query)
		if compared == nil {
			t.Errorf("%s compares nothing: %s", r.Name, r.Query)
			continue
		}
		says(compared[1])
		if r.Health == "err" {
			t.Errorf("%s: %s", r.Name, r.LastError)
		}
	}
	if v, err := p.values(t.Context(), `ALERTS{alertstate="firing"}`); err != nil || len(v) > 0 {
		t.Errorf("all is well, and there are alerts: %v, %v", v, err)
	}
}
