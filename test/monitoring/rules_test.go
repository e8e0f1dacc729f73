// Package monitoring tests deploy/monitoring with promtool and a real Prometheus.
package monitoring

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

const folder = "../../deploy/monitoring"

// program returns the path of a program of Debian's prometheus package. In CI it must exist.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("%v: install Debian's prometheus package", err)
		}
		t.Skipf("%v: `apt-get install prometheus` brings it", err)
	}
	return path
}

// TestRules runs the unit tests of the alerts.
func TestRules(t *testing.T) {
	promtool := program(t, "promtool")
	for _, args := range [][]string{{"check", "rules", "rules.yaml"}, {"test", "rules", "rules_test.yaml"}} {
		cmd := exec.Command(promtool, args...)
		cmd.Dir = folder
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// TestComposeLoadsTheRules checks that the configuration of docker-compose.yml's Prometheus loads
// rules.yaml from its folder, and no other file.
func TestComposeLoadsTheRules(t *testing.T) {
	promtool := program(t, "promtool")
	const inContainer = "/etc/prometheus/rules"
	if compose := string(read(t, "../../docker-compose.yml")); !strings.Contains(compose, "./deploy/monitoring:"+inContainer+":ro") {
		t.Errorf("docker-compose.yml does not mount deploy/monitoring at %s", inContainer)
	}
	here, err := filepath.Abs(folder)
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(t.TempDir(), "prometheus.yml")
	text := strings.ReplaceAll(string(read(t, "../../deploy/compose/prometheus.yml")), inContainer, here)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(promtool, "check", "config", config).CombinedOutput()
	if err != nil || !strings.Contains(string(out), fmt.Sprintf("%d rules found", len(rules(t)))) {
		t.Errorf("promtool check config: %v\n%s", err, out)
	}
}

type rule struct {
	Alert, Record, Expr string
	Labels              map[string]string
	Annotations         map[string]string
}

func rules(t *testing.T) (all []rule) {
	t.Helper()
	var file struct {
		Groups []struct{ Rules []rule }
	}
	decode(t, "rules.yaml", &file)
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	return all
}

// TestAlerts checks that every alert has a severity, a summary, a unit test that fires it, and a
// section in the runbook, and that every section of the runbook has an alert.
func TestAlerts(t *testing.T) {
	var unit struct {
		Tests []struct {
			AlertRuleTest []struct {
				Alertname string
				ExpAlerts []any `yaml:"exp_alerts"`
			} `yaml:"alert_rule_test"`
		}
	}
	decode(t, "rules_test.yaml", &unit)
	fires := make(map[string]bool)
	for _, test := range unit.Tests {
		for _, a := range test.AlertRuleTest {
			fires[a.Alertname] = fires[a.Alertname] || len(a.ExpAlerts) > 0
		}
	}
	sections := make(map[string]bool)
	for _, m := range regexp.MustCompile(`(?m)^## (EtcdKMSProxy\w+)$`).FindAllStringSubmatch(string(read(t, "../../docs/guides/runbook.md")), -1) {
		sections[m[1]] = true
	}
	for _, r := range rules(t) {
		if r.Alert == "" {
			continue
		}
		if !slices.Contains([]string{"critical", "warning", "info"}, r.Labels["severity"]) || r.Annotations["summary"] == "" {
			t.Errorf("%s lacks a severity or a summary", r.Alert)
		}
		if !fires[r.Alert] {
			t.Errorf("no unit test fires %s", r.Alert)
		}
		if !sections[r.Alert] {
			t.Errorf("docs/guides/runbook.md has no section %s", r.Alert)
		}
		delete(sections, r.Alert)
	}
	for name := range sections {
		t.Errorf("docs/guides/runbook.md has a section %s, and there is no such alert", name)
	}
}

// TestNames checks that rules and dashboard use only metrics that the docs list.
func TestNames(t *testing.T) {
	listed := string(read(t, "../../docs/reference/metrics.md"))
	expressions := string(read(t, filepath.Join(folder, "dashboard.json")))
	for _, r := range rules(t) {
		expressions += r.Expr + "\n"
	}
	names := regexp.MustCompile(`\betcd_kms_proxy_\w+`).FindAllString(expressions, -1)
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		name = strings.TrimSuffix(name, "_bucket")
		if !strings.Contains(listed, "`"+name+"`") {
			t.Errorf("%s is not a metric of docs/reference/metrics.md", name)
		}
	}
}

func decode(t *testing.T, name string, into any) {
	t.Helper()
	if err := yaml.Unmarshal(read(t, filepath.Join(folder, name)), into); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
