// Package compose runs the project's docker-compose.yml on a real Docker engine, with images that
// were built from the project's Dockerfile and with real members of etcd.
//
// It runs only with COMPOSE_TEST=1, which `make compose-test` sets after it has built the images:
// it takes minutes, needs an engine and publishes ports on 127.0.0.1. DOCKER names the client.
package compose

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// within limits every wait of a test.
const within = 2 * time.Minute

// stack is a Compose project. Its methods fail the test, and must be called from its goroutine.
type stack struct {
	t       *testing.T
	compose []string // the command
	project string
	folder  string   // docker-compose.yml
	extra   []string // further arguments before the command
	scratch string   // a folder for its files
	env     []string // as .env would set it
	// ports are the published addresses, by their variable.
	ports map[string]string
}

// wanted skips the test unless it was requested.
func wanted(t *testing.T) {
	t.Helper()
	if os.Getenv("COMPOSE_TEST") == "" {
		t.Skip("needs a Docker engine and the images: make compose-test runs it")
	}
}

// composeV2 and composeV1 are the commands of both generations of Compose.
func composeV2(t *testing.T) []string {
	t.Helper()
	wanted(t)
	return []string{harness.Bin(t, "docker-compose-v2")}
}

func composeV1(t *testing.T) []string {
	t.Helper()
	wanted(t)
	for _, name := range []string{"docker-compose", "/usr/bin/docker-compose"} {
		out, err := exec.Command(name, "version", "--short").Output()
		if err == nil && bytes.HasPrefix(out, []byte("1.")) {
			return []string{name}
		}
	}
	t.Skip("docker-compose 1.29 is not installed (Debian's package docker-compose)")
	return nil
}

// newStack prepares a project, which is removed at the end of the test.
func newStack(t *testing.T, compose []string) *stack {
	t.Helper()
	wanted(t)
	var random [4]byte
	_, _ = rand.Read(random[:])
	s := &stack{t: t, compose: compose, project: "ekptest" + hex.EncodeToString(random[:]), ports: make(map[string]string)}
	s.scratch = t.TempDir() // which is removed after the stack
	var err error
	if s.folder, err = filepath.Abs(filepath.Join("..", "..")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"PROXY_1_ADDRESS", "PROXY_2_ADDRESS", "KUBE_APISERVER_ADDRESS", "PROMETHEUS_ADDRESS"} {
		s.ports[name] = fmt.Sprintf("127.0.0.1:%d", harness.FreePort(t))
		s.env = append(s.env, name+"="+s.ports[name])
	}
	// A developer's own .env must not apply.
	s.env = append(s.env, "KMS=", "ALIBABA_KMS_REGION=", "ALIBABA_KMS_KEY_ID=", "ALIBABA_KMS_CREDENTIALS=",
		"ALIBABA_CLOUD_ACCESS_KEY_ID=", "ALIBABA_CLOUD_ACCESS_KEY_SECRET=", "ALIBABA_CLOUD_SECURITY_TOKEN=")
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := s.try(context.Background(), "logs", "--tail=10", "setup", "proxy-1", "proxy-2")
			t.Logf("%s", out)
		}
		// Including what profiles started.
		if out, err := s.try(context.Background(), "--profile", "kubernetes", "--profile", "monitoring", "down", "--volumes", "--timeout", "15"); err != nil {
			t.Errorf("remove the stack: %v\n%s", err, out)
		}
	})
	return s
}

// try runs Compose, and returns all that it prints.
func (s *stack) try(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*within)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.compose[0], append(append(s.compose[1:len(s.compose):len(s.compose)], "-p", s.project, "-f", filepath.Join(s.folder, "docker-compose.yml")), append(s.extra, args...)...)...)
	cmd.Env = append(os.Environ(), s.env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// run is try for commands that must succeed.
func (s *stack) run(args ...string) string {
	s.t.Helper()
	out, err := s.try(s.t.Context(), args...)
	if err != nil {
		s.t.Fatalf("compose %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func dockerClient() string { return cmp.Or(os.Getenv("DOCKER"), "docker") }

// docker runs the Docker client.
func docker(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	out, err := exec.CommandContext(ctx, dockerClient(), args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out)), err
}

func (s *stack) docker(args ...string) string {
	s.t.Helper()
	out, err := docker(s.t.Context(), args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

// container returns the container of a service.
func (s *stack) container(service string) string {
	s.t.Helper()
	id := s.docker("ps", "-aq", "--filter", "label=com.docker.compose.project="+s.project, "--filter", "label=com.docker.compose.service="+service,
		"--filter", "label=com.docker.compose.oneoff=False")
	if id == "" || strings.Contains(id, "\n") {
		s.t.Fatalf("the containers of %s are %q", service, id)
	}
	return id
}

// network returns a network of the file.
func (s *stack) network(name string) string {
	s.t.Helper()
	return s.docker("network", "ls", "-q", "--filter", "label=com.docker.compose.project="+s.project, "--filter", "label=com.docker.compose.network="+name)
}

// up starts the stack and waits until every container with a health check is healthy.
func (s *stack) up(args ...string) {
	s.t.Helper()
	s.run(append(args, "up", "-d")...)
	s.healthy("etcd-1", "etcd-2", "etcd-3", "proxy-1", "proxy-2")
}

func (s *stack) healthy(services ...string) {
	s.t.Helper()
	for _, service := range services {
		id := s.container(service)
		harness.Eventually(s.t, within, service+" to be healthy", func() error {
			state, err := docker(s.t.Context(), "inspect", "-f", "{{.State.Health.Status}} {{range .State.Health.Log}}{{.Output}}{{end}}", id)
			if err == nil && !strings.HasPrefix(state, "healthy") {
				err = errors.New(state)
			}
			return err
		})
	}
}

// clientTLS returns what a client needs, copied from the stack as docs/deploy/compose.md describes.
func (s *stack) clientTLS() *tls.Config {
	s.t.Helper()
	dir := s.clientFolder()
	roots := x509.NewCertPool()
	ca, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil || !roots.AppendCertsFromPEM(ca) {
		s.t.Fatal("read the authority: ", err)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key"))
	if err != nil {
		s.t.Fatal(err)
	}
	return &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
}

func (s *stack) clientFolder() string {
	s.t.Helper()
	dir := filepath.Join(s.t.TempDir(), "client")
	s.docker("cp", s.container("setup")+":/setup/client", dir)
	return dir
}
