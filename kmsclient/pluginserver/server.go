// Package pluginserver serves a KMS as a Kubernetes KMS v2 plugin, for the API server's own
// encryption: it is what `kms serve-plugin` runs. Package plugin is the client of such plugins.
package pluginserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// DefaultDrainTimeout is how long running calls may take once a [Server] shuts down. It leaves room
// for the retries of the KMS client.
const DefaultDrainTimeout = 10 * time.Second

// Config configures a [Server]. The zero value of each duration but SealUnreachableFor is the
// default that it names.
type Config struct {
	// Provider is the name in errors and logs.
	Provider string
	// KMS is the backend in the wrapper that all backends share ([kmsclient.Client]), which makes
	// the only retries.
	KMS kmsclient.Service
	// PollInterval is the time between health checks while they succeed; default 1 m.
	PollInterval time.Duration
	// FailingPollInterval is the same while they fail; default 10 s.
	FailingPollInterval time.Duration
	// SealUnreachableFor is how long after the last good health check Status still names the key
	// ID, next to what is wrong, while the KMS is unreachable. For that long an API server encrypts
	// with the DEK seed that it has. After it, and at once when the KMS denies access or the key
	// may not be used, Status is an error; an API server stops writing three minutes later.
	SealUnreachableFor time.Duration
	// DrainTimeout is how long running calls may take once the server shuts down; default
	// [DefaultDrainTimeout].
	DrainTimeout time.Duration
	// Logger logs what changes, and calls that fail. The default discards.
	Logger *slog.Logger
	// Observer is called for each answered call ("Encrypt", "Decrypt" or "Status"), on its
	// goroutine; it must not block. May be nil.
	Observer func(op string, code codes.Code)
}

// Server serves one KMS as a Kubernetes KMS v2 plugin.
//
// Encrypt and Decrypt call the KMS. Status returns the result of the last health check, so that no
// number of clients costs KMS calls. The key ID in Status is the one that Encrypt would return: if
// the KMS' own Status names another one, which an API server takes for a fault, Encrypt's counts.
//
// Errors are gRPC statuses by their reason (Unavailable, Unknown, PermissionDenied,
// FailedPrecondition, NotFound for a key that is gone, InvalidArgument, Internal) whose texts hold
// nothing secret. There is no authentication: every process that can connect to the socket may wrap
// and unwrap.
type Server struct {
	kmsapi.UnimplementedKeyManagementServiceServer
	cfg Config
	key *keyState

	failures       atomic.Int64 // failed calls, since the last one that was logged
	failuresLogged rate.Sometimes
}

// New makes a server. It makes no call and starts nothing.
func New(cfg Config) (*Server, error) {
	if cfg.Provider == "" || cfg.KMS == nil {
		return nil, errors.New("a plugin server needs a provider's name and a KMS client")
	}
	if cfg.PollInterval < 0 || cfg.FailingPollInterval < 0 || cfg.SealUnreachableFor < 0 || cfg.DrainTimeout < 0 {
		return nil, fmt.Errorf("plugin server of %q: durations must not be negative", cfg.Provider)
	}
	cfg.PollInterval = cmp.Or(cfg.PollInterval, time.Minute)
	cfg.FailingPollInterval = cmp.Or(cfg.FailingPollInterval, 10*time.Second)
	cfg.DrainTimeout = cmp.Or(cfg.DrainTimeout, DefaultDrainTimeout)
	cfg.Logger = cmp.Or(cfg.Logger, slog.New(slog.DiscardHandler))
	if cfg.Observer == nil {
		cfg.Observer = func(string, codes.Code) {}
	}
	key := &keyState{cfg: &cfg, checked: make(chan struct{})}
	key.checks = kmsclient.NewPoller(key.check, key.pause)
	return &Server{cfg: cfg, key: key, failuresLogged: rate.Sometimes{Interval: time.Second}}, nil
}

// Serve serves on l, which it closes, until ctx ends. Then it waits for running calls, cancels them
// after DrainTimeout, and returns nil. Nothing of the server runs any more once it has returned. It
// may be called once.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	// WaitForHandlers: canceled calls have ended, too, before this returns.
	server := grpc.NewServer(grpc.UnaryInterceptor(s.intercept), grpc.WaitForHandlers(true), grpc.ConnectionTimeout(10*time.Second))
	kmsapi.RegisterKeyManagementServiceServer(server, s)

	// Health checks continue while calls are finished: a Status may wait for the first one.
	polling, end := context.WithCancel(context.WithoutCancel(ctx))
	var rest sync.WaitGroup
	defer rest.Wait()
	defer end()
	rest.Go(func() { s.key.checks.Run(polling) })

	drained := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(drained)
		cut := time.AfterFunc(s.cfg.DrainTimeout, server.Stop)
		defer cut.Stop()
		server.GracefulStop()
	})
	err := server.Serve(l)
	if !cancel() {
		<-drained
		return nil
	}
	server.Stop()
	return fmt.Errorf("serve plugin: %w", err)
}

// Status implements the KMS v2 API. It waits for the first health check, and makes no KMS call.
func (s *Server) Status(ctx context.Context, _ *kmsapi.StatusRequest) (*kmsapi.StatusResponse, error) {
	select {
	case <-s.key.checked:
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	k := s.key.load()
	switch {
	case k.err == nil:
		return &kmsapi.StatusResponse{Version: "v2", Healthz: "ok", KeyId: k.keyID}, nil
	case kmsclient.ClassOf(k.err) == kmsclient.ClassUnavailable && k.keyID != "" && time.Since(k.lastGood) < s.cfg.SealUnreachableFor:
		return &kmsapi.StatusResponse{Version: "v2", Healthz: text(k.err), KeyId: k.keyID}, nil
	}
	return nil, statusOf(context.WithoutCancel(ctx), k.err)
}

// Encrypt implements the KMS v2 API. An annotation of the response holds the KMS' request ID, if
// there is one.
func (s *Server) Encrypt(ctx context.Context, req *kmsapi.EncryptRequest) (*kmsapi.EncryptResponse, error) {
	changes := s.key.load().changes
	noting, requestID := kmsclient.WithRequestID(ctx)
	res, err := s.cfg.KMS.Encrypt(noting, req.GetUid(), req.GetPlaintext())
	if err != nil {
		s.key.noteEncrypted(changes, "", err)
		return nil, statusOf(ctx, err)
	}
	s.key.noteEncrypted(changes, res.KeyID, nil)
	return &kmsapi.EncryptResponse{Ciphertext: res.Ciphertext, KeyId: res.KeyID, Annotations: withRequestID(res.Annotations, requestID())}, nil
}

// Decrypt implements the KMS v2 API. It unwraps what Encrypt returned, what the proxy wrapped by
// the same KMS, and what the KMS itself wrapped.
func (s *Server) Decrypt(ctx context.Context, req *kmsapi.DecryptRequest) (*kmsapi.DecryptResponse, error) {
	data, err := s.cfg.KMS.Decrypt(ctx, req.GetUid(), &service.DecryptRequest{
		Ciphertext: req.GetCiphertext(), KeyID: req.GetKeyId(), Annotations: kmsAnnotations(req.GetAnnotations()),
	})
	if err != nil {
		return nil, statusOf(ctx, err)
	}
	return &kmsapi.DecryptResponse{Plaintext: data}, nil
}

// intercept logs calls that fail, and keeps a panic from ending the process.
func (s *Server) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (res any, err error) {
	op := info.FullMethod[len("/"+kmsapi.KeyManagementService_ServiceDesc.ServiceName+"/"):]
	defer func() {
		if recover() != nil { // the panic's value may hold a secret
			res, err = nil, status.Error(codes.Internal, prefix+"a defect of the plugin server; see the metrics and the log")
		}
		code := status.Code(err)
		s.cfg.Observer(op, code)
		if err != nil && op != "Status" { // those of Status are in the log already
			s.failed(op, req, err)
		}
	}()
	return handler(ctx, req)
}

// failed logs at most once a second: an API server that starts while its key is disabled makes many
// calls.
func (s *Server) failed(op string, req any, err error) {
	uid := ""
	if r, ok := req.(interface{ GetUid() string }); ok {
		uid = r.GetUid()
	}
	s.failures.Add(1)
	s.failuresLogged.Do(func() {
		s.cfg.Logger.Warn("call failed", "provider", s.cfg.Provider, "operation", op, "uid", uid[:min(len(uid), 64)],
			"code", status.Code(err).String(), "reason", status.Convert(err).Message(), "notLoggedBefore", s.failures.Swap(0)-1)
	})
}

// prefix begins the texts that API servers see.
const prefix = "etcd-kms-proxy: "

// text returns what clients may read of an error: a [*kmsclient.Error] holds nothing secret.
func text(err error) string {
	if e, ok := errors.AsType[*kmsclient.Error](err); ok {
		return prefix + e.Error()
	}
	return prefix + "the KMS call failed"
}

// statusOf returns an error with the code of its reason, which package plugin turns back. If the
// call's context has ended, the error says only that.
func statusOf(ctx context.Context, err error) error {
	if cause := ctx.Err(); cause != nil {
		return status.FromContextError(cause).Err()
	}
	code := codes.Unavailable
	switch kmsclient.ReasonOf(err) {
	case kmsclient.Unreachable:
	case kmsclient.Failing, kmsclient.Unhealthy:
		code = codes.Unknown
	case kmsclient.Denied:
		code = codes.PermissionDenied
	case kmsclient.KeyDisabled:
		code = codes.FailedPrecondition
	case kmsclient.KeyGone, kmsclient.KeyNotFound, kmsclient.AliasNotFound:
		// a proxy uses recovery copies then, and not if an operator has disabled the key
		code = codes.NotFound
	case kmsclient.Invalid:
		code = codes.InvalidArgument
	case kmsclient.BrokenContract:
		code = codes.Internal
	}
	return status.Error(code, text(err))
}
