package compose

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/canary"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// needImage skips the test if an image could not be built, which make image-offline has reported.
func (s *stack) needImage(variable string) {
	s.t.Helper()
	data, err := os.ReadFile(filepath.Join(s.folder, "docker-compose.yml"))
	if err != nil {
		s.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), "${"+variable+":-")
	name, _, _ := strings.Cut(rest, "}")
	if _, err := docker(s.t.Context(), "image", "inspect", name); err != nil {
		s.t.Skipf("there is no image %s: make image-offline says why", name)
	}
}

// TestKubernetes starts the profile's kube-apiserver, and checks that what it stores is encrypted.
func TestKubernetes(t *testing.T) {
	s := newStack(t, composeV2(t))
	s.needImage("KUBE_APISERVER_IMAGE")
	s.up("--profile", "kubernetes")
	// As in docs/deploy/compose.md, except for the port.
	kubeconfig := filepath.Join(s.clientFolder(), "kubeconfig")
	kubectl := func(args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		out, err := exec.CommandContext(ctx, harness.Bin(t, "kubectl"), append([]string{"--kubeconfig", kubeconfig, "--server", "https://" + s.ports["KUBE_APISERVER_ADDRESS"]}, args...)...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("kubectl %v: %w: %s", args, err, out)
		}
		return string(out), err
	}
	values := canary.New("a Secret")
	harness.Eventually(t, within, "kube-apiserver to take a Secret", func() error {
		if _, err := kubectl("get", "--raw", "/readyz"); err != nil {
			return err
		}
		_, err := kubectl("create", "secret", "generic", "db", "--from-literal=password="+values.Value("password"))
		return err
	})
	if stored := s.run("exec", "-T", "etcd-1", "/usr/local/bin/etcdctl", "get", "/registry/secrets/default/db", "--print-value-only"); !strings.HasPrefix(stored, "k8s:enc:kms:v2:local:") {
		t.Errorf("the Secret is stored as %.40q", stored)
	}
	s.searchVolumes(values)
}

// TestMonitoring checks that the profile's Prometheus scrapes both proxies, and loads the rules of
// deploy/monitoring.
func TestMonitoring(t *testing.T) {
	s := newStack(t, composeV2(t))
	s.needImage("PROMETHEUS_IMAGE")
	s.up("--profile", "monitoring")
	harness.Eventually(t, within, "Prometheus to scrape both proxies", func() error {
		var answer struct {
			Data struct {
				ActiveTargets []struct{ ScrapeURL, Health, LastError string }
			}
		}
		if err := s.prometheus("/api/v1/targets", &answer); err != nil {
			return err
		}
		up := 0
		for _, target := range answer.Data.ActiveTargets {
			if target.Health == "up" {
				up++
			}
		}
		if up != 2 {
			return fmt.Errorf("%+v", answer.Data.ActiveTargets)
		}
		return nil
	})
	var answer struct {
		Data struct {
			Groups []struct{ Name, File string }
		}
	}
	if err := s.prometheus("/api/v1/rules", &answer); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, group := range answer.Data.Groups {
		names = append(names, group.Name)
	}
	slices.Sort(names)
	if want := []string{"etcd-kms-proxy.alerts", "etcd-kms-proxy.recording"}; !slices.Equal(names, want) {
		t.Errorf("the groups of rules are %v, want %v", names, want)
	}
}

func (s *stack) prometheus(path string, into any) error {
	client := http.Client{Timeout: 10 * time.Second}
	res, err := client.Get("http://" + s.ports["PROMETHEUS_ADDRESS"] + path)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		return errors.Join(err, fmt.Errorf("%s: %s", res.Status, body))
	}
	return json.Unmarshal(body, into)
}
