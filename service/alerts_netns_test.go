package service

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

// promtool is the variable that names promtool; `make test` sets it.
const promtool = "GME_TEST_PROMTOOL"

// alertsNode is a node whose metrics are scraped, and whose rules are read back for every scrape
// while they are watched.
type alertsNode struct {
	*kernelNode
	asker   *podNode
	watched bool
	asked   int
	other   *testNode // whose service is scraped instead
}

// states are faults, and the alerts that fire while each lasts. cause and mend change the node;
// while is done before each scrape of the fault.
var states = []struct {
	name               string
	alerts             []string
	cause, while, mend func(*alertsNode, *testing.T)
}{
	{"the service is down", []string{"Down"},
		func(b *alertsNode, _ *testing.T) { b.kill(b.server) }, nil,
		func(b *alertsNode, t *testing.T) { b.serve(t) }},
	{"rules are gone", []string{"RulesMissing"},
		func(b *alertsNode, _ *testing.T) {
			b.run("iptables -t nat -F PREROUTING")
			b.plan.Binary = "iptables-that-nobody-has"
		}, nil,
		func(b *alertsNode, _ *testing.T) { b.plan.Binary = "" }},
	{"the rules are not watched", []string{"RulesNotWatched"},
		func(b *alertsNode, _ *testing.T) { b.watched = false }, nil,
		func(b *alertsNode, _ *testing.T) { b.watched = true }},
	{"rules are removed all the time", []string{"RulesRemovedAgainAndAgain"}, nil, (*alertsNode).removeAndRepair, nil},
	{"the helper is away", []string{"HelperAway"},
		func(b *alertsNode, t *testing.T) {
			b.kill(b.helper)
			b.eventually(t, "it is away", func() bool { return !statusOf(t, b.dir).Attestation.Kernel.Helper })
		}, nil,
		func(b *alertsNode, t *testing.T) { b.startHelper(); b.served(t) }},
	{"the API server is away", []string{"PodWatchStale"},
		func(b *alertsNode, t *testing.T) {
			b.kube.Refuse()
			b.kube.DropWatches()
			b.eventually(t, "the watch is over", func() bool { return !statusOf(t, b.dir).Cluster.Watching })
		}, nil,
		func(b *alertsNode, t *testing.T) {
			b.kube.Accept()
			b.eventually(t, "it watches again", func() bool { return statusOf(t, b.dir).Cluster.Watching })
		}},
	{"Google refuses", []string{"MintsRefused"},
		func(b *alertsNode, _ *testing.T) {
			b.google.Break(googletest.Exchange, googletest.Fault{Status: 403, Message: "denied"})
		},
		func(b *alertsNode, t *testing.T) { b.askAnew(t, 403) },
		func(b *alertsNode, _ *testing.T) { b.google.Heal() }},
	{"Google is unavailable", []string{"MintsFail", "RequestsFail"},
		func(b *alertsNode, _ *testing.T) { b.google.Break(googletest.Exchange, googletest.Fault{Drop: true}) },
		func(b *alertsNode, t *testing.T) { b.askAnew(t, 503) },
		func(b *alertsNode, _ *testing.T) { b.google.Heal() }},
	{"the node's certificate expires", []string{"CredentialExpires"},
		func(b *alertsNode, t *testing.T) {
			if _, err := b.kube.RotateNodeCertFor(node, 20*time.Minute); err != nil {
				t.Fatal(err)
			}
			config, err := b.kube.Kubeconfig(node)
			if err != nil {
				t.Fatal(err)
			}
			b.useKubeconfig(t, config)
		}, nil,
		func(b *alertsNode, t *testing.T) {
			config, err := b.kube.TokenKubeconfig("dedicated-secret")
			if err != nil {
				t.Fatal(err)
			}
			b.useKubeconfig(t, config)
		}},
	{"there is no configuration", []string{"Unconfigured", "ConfigInvalid"},
		func(b *alertsNode, t *testing.T) {
			b.other = newWorld(t) // systemd hands its listener over, without which the service would end
			b.other.write(t, "config.yaml", "projektID: my-project\n")
			b.other.start(t)
		}, nil,
		func(b *alertsNode, _ *testing.T) { b.other = nil }},
	{"the configuration is broken", []string{"ConfigInvalid"},
		func(b *alertsNode, t *testing.T) { b.reconfigure(t, "projectID:", "projektID:") }, nil,
		func(b *alertsNode, t *testing.T) { b.reconfigure(t, "projektID:", "projectID:") }},
}

// A service that is brought into each state makes the series of which promtool says which alerts
// fire: those of the state, while it lasts, and none before and after it. Two scrapes of a state
// say what a series is and how fast it changes.
func TestAlerts(t *testing.T) {
	t.Parallel()
	tool := os.Getenv(promtool)
	if tool == "" {
		netnstest.Lacks(t, errors.New(promtool+" names no promtool, of Debian's package prometheus: `make test` fetches one"))
	}
	b := newAlertsNode(t)
	before := b.scrapeTwice(t, func(b *alertsNode, t *testing.T) { b.askAnew(t, 200) })
	tests := []any{dashboardTest(t, before)}
	for _, s := range states {
		if s.cause != nil {
			s.cause(b, t)
		}
		during := b.scrapeTwice(t, s.while)
		if s.mend != nil {
			s.mend(b, t)
		}
		after := b.scrapeTwice(t, nil)
		tests = append(tests, alertTest(s.name, s.alerts, before, during, after))
		before = after
	}
	rules, err := filepath.Abs("../packaging/monitoring/rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(map[string]any{"rule_files": []string{rules}, "evaluation_interval": "1m", "tests": tests})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "alerts.yaml") // JSON is YAML
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), tool, "test", "rules", file).CombinedOutput(); err != nil {
		t.Errorf("promtool: %v\n%s", err, out)
	}
	b.everyAlertHasAState(t, rules)
}

// Every alert is provoked above, or named here with the reason why it is not.
func (b *alertsNode) everyAlertHasAState(t *testing.T, rules string) {
	text, err := os.ReadFile(rules)
	if err != nil {
		t.Fatal(err)
	}
	runbook, err := os.ReadFile("../docs/runbook.md")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		name, is := strings.CutPrefix(strings.TrimSpace(line), "- alert: GKEMetadataEmulator")
		if !is {
			continue
		}
		// 10,000 connections would be needed here; TestNoRoom in package server provokes the series.
		provoked := name == "ConnectionsRefused"
		for _, s := range states {
			provoked = provoked || slices.Contains(s.alerts, name)
		}
		if !provoked {
			t.Errorf("no state provokes %s", name)
		}
		if !strings.Contains(string(runbook), "\n## GKEMetadataEmulator"+name+"\n") {
			t.Errorf("docs/runbook.md does not say what to do about %s", name)
		}
	}
}

func newAlertsNode(t *testing.T) *alertsNode {
	t.Helper()
	b := &alertsNode{kernelNode: newKernelNode(t), watched: true}
	b.scraped(t)
	b.asker = b.newAsker(t)
	b.served(t)
	return b
}

// useKubeconfig has the service ask the Kubernetes API with another credential.
func (b *alertsNode) useKubeconfig(t *testing.T, config []byte) {
	t.Helper()
	const expiry = "gke_metadata_emulator_node_credential_expiry_timestamp_seconds"
	before := b.scrape(t)[expiry] != nil
	b.write(t, "kubeconfig", string(config))
	b.eventually(t, "it asks with the other credential", func() bool {
		return (b.scrape(t)[expiry] != nil) != before && statusOf(t, b.dir).Cluster.Watching
	})
}

// served waits until the service is as it was.
func (b *alertsNode) served(t *testing.T) {
	t.Helper()
	b.eventually(t, "it is served", func() bool { return b.asker.mustAsk(t, accts+"default/token").Status == 200 })
}

// askAnew asks for a token that no cache has.
func (b *alertsNode) askAnew(t *testing.T, want int) {
	t.Helper()
	b.asked++
	scope := fmt.Sprintf("https://www.googleapis.com/auth/scope%d", b.asked)
	if a := b.asker.mustAsk(t, accts+"default/token?scopes="+scope); a.Status != want {
		t.Fatalf("status %d, want %d: %s", a.Status, want, a.Body)
	}
}

// reconfigure has the service read another configuration.
func (b *alertsNode) reconfigure(t *testing.T, old, text string) {
	t.Helper()
	before := statusOf(t, b.dir).ConfigFile
	b.replace(t, "config.yaml", old, text)
	if err := b.server.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	b.eventually(t, "the configuration is read again", func() bool { return statusOf(t, b.dir).ConfigFile != before })
}

// removeAndRepair flushes a chain, and has a watcher put it back.
func (b *alertsNode) removeAndRepair(t *testing.T) {
	t.Helper()
	before, err := routing.ReadState(b.dir)
	if err != nil {
		t.Fatal(err)
	}
	watch := b.routing(b.plan, io.Discard, "watch")
	defer b.kill(watch)
	b.run("iptables -t nat -F PREROUTING")
	b.eventually(t, "it is repaired", func() bool {
		now, err := routing.ReadState(b.dir)
		return err == nil && now.Standing.Good && now.Repairs.Total() > before.Repairs.Total()
	})
}

// scrape returns what Prometheus gets; nil: no answer.
func (b *alertsNode) scrape(t *testing.T) map[string]*dto.MetricFamily {
	t.Helper()
	if b.other != nil {
		return b.other.families(t)
	}
	res, err := b.getHealth("/metrics")
	if err != nil {
		return nil
	}
	defer res.Body.Close()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	return families
}

// families are what the service of the test node exports to Prometheus, by name.
func (b *testNode) families(t *testing.T) map[string]*dto.MetricFamily {
	t.Helper()
	all, err := b.gather().Gather()
	if err != nil {
		t.Fatal(err)
	}
	families := map[string]*dto.MetricFamily{}
	for _, f := range all {
		families[f.GetName()] = f
	}
	return families
}

// look is a scrape of a state: each of our series with its value, and how much it changes in a
// minute.
type look struct {
	up     bool
	at     time.Time
	values map[string]float64
}

func (b *alertsNode) look(t *testing.T, while func(*alertsNode, *testing.T)) look {
	t.Helper()
	if while != nil {
		while(b, t)
	}
	if b.watched {
		// Fails where the state is that it fails: what is read back says so.
		_, _ = b.tryRoute(b.plan, "install")
	}
	l := look{at: time.Now(), values: map[string]float64{}}
	families := b.scrape(t)
	l.up = families != nil
	for name, f := range families {
		if !strings.HasPrefix(name, "gke_metadata_emulator_") && !strings.HasPrefix(name, "process_") {
			continue
		}
		for _, m := range f.Metric {
			labels := `job="gke-metadata-emulator",instance="node-1"`
			for _, p := range m.Label {
				labels += fmt.Sprintf(",%s=%q", p.GetName(), p.GetValue())
			}
			if v := m.GetGauge(); v != nil {
				l.values[name+"{"+labels+"}"] = v.GetValue()
			} else if v := m.GetCounter(); v != nil {
				l.values[name+"{"+labels+"}"] = v.GetValue()
			}
			for _, bucket := range m.GetHistogram().GetBucket() {
				l.values[fmt.Sprintf(`%s_bucket{%s,le="%g"}`, name, labels, bucket.GetUpperBound())] =
					float64(bucket.GetCumulativeCount())
			}
		}
	}
	return l
}

func (b *alertsNode) scrapeTwice(t *testing.T, while func(*alertsNode, *testing.T)) [2]look {
	t.Helper()
	first := b.look(t, while)
	// Times are whole seconds: what follows the clock has changed then.
	b.eventually(t, "the next second has begun", func() bool { return time.Since(first.at) > 1100*time.Millisecond })
	return [2]look{first, b.look(t, while)}
}

// alertTest is a test of promtool's. A state lasts half an hour, and is over for as long as an
// alert looks back.
func alertTest(name string, alerts []string, before, during, after [2]look) map[string]any {
	fire := []map[string]any{}
	for _, a := range alerts {
		fire = append(fire, map[string]any{"labels": `{alertname="GKEMetadataEmulator` + a + `"}`, "value": 1})
	}
	const firing = `count by (alertname) (ALERTS{alertstate="firing"})`
	return map[string]any{"name": name, "interval": "1m",
		"input_series": inputSeries([]segment{{before, 0, 30}, {during, 30, 30}, {after, 60, 90}}),
		"promql_expr_test": []map[string]any{
			{"expr": firing, "eval_time": "29m", "exp_samples": []any{}},
			{"expr": firing, "eval_time": "59m", "exp_samples": fire},
			{"expr": firing, "eval_time": "149m", "exp_samples": []any{}},
		}}
}

// dashboardTest is a test of promtool's: each query of the dashboard finds something in what a
// healthy service says.
func dashboardTest(t *testing.T, healthy [2]look) map[string]any {
	t.Helper()
	text, err := os.ReadFile("../packaging/monitoring/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	var queries []map[string]any
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			expr := strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*").Replace(target.Expr)
			queries = append(queries, map[string]any{"expr": "count(" + expr + ") > bool 0", "eval_time": "29m",
				"exp_samples": []map[string]any{{"labels": "{}", "value": 1}}})
		}
	}
	if len(queries) == 0 {
		t.Error("the dashboard has no queries")
	}
	return map[string]any{"name": "dashboard", "interval": "1m", "input_series": inputSeries([]segment{{healthy, 0, 30}}),
		"promql_expr_test": queries}
}

// segment is a state that begins and lasts, in minutes.
type segment struct {
	looks          [2]look
	begin, minutes int
}

// inputSeries are promtool's input, whose time begins at 0.
func inputSeries(segments []segment) []map[string]string {
	series := map[string]bool{}
	for _, s := range segments {
		for name := range s.looks[1].values {
			series[name] = true
		}
	}
	const up = `up{job="gke-metadata-emulator",instance="node-1"}`
	input := []map[string]string{}
	for name := range series {
		var values []string
		for _, s := range segments {
			v, is := s.looks[1].values[name]
			if !is {
				values = append(values, fmt.Sprintf("_x%d", s.minutes))
				continue
			}
			step := 0.0
			if old, was := s.looks[0].values[name]; was {
				step = v - old
			}
			switch base, _, _ := strings.Cut(name, "{"); {
			case strings.HasSuffix(base, "_timestamp_seconds"):
				v -= float64(s.looks[1].at.Unix() - int64(60*s.begin))
				fallthrough
			case strings.HasSuffix(base, "_seconds"): // the clock has them change, or nothing has
				if step != 0 {
					step = 60
				}
			}
			values = append(values, strconv.FormatFloat(v, 'f', -1, 64)+strings.Replace(fmt.Sprintf("%+g", step), "+-", "-", 1)+
				"x"+strconv.Itoa(s.minutes-1))
		}
		input = append(input, map[string]string{"series": name, "values": strings.Join(values, " ")})
	}
	var ups []string
	for _, s := range segments {
		ups = append(ups, fmt.Sprintf("%dx%d", map[bool]int{true: 1}[s.looks[1].up], s.minutes-1))
	}
	input = append(input, map[string]string{"series": up, "values": strings.Join(ups, " ")})
	return input
}
