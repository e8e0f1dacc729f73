package plugin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// DefaultDrainTimeout is how long calls under way may take once a [Server] is told to end: the wrapper's attempts fit in.
const DefaultDrainTimeout = 10 * time.Second

// ServerConfig says what a [Server] serves. The zero value of each duration but SealUnreachableFor is the default that it names.
type ServerConfig struct {
	// Provider is the name in errors and logs.
	Provider string
	// KMS is the backend in the wrapper that all backends share ([kmsclient.Client]), whose are the only retries, or what stands before that.
	KMS kmsclient.Service
	// PollInterval is how often the KMS is asked for the key's state; default 1 m.
	PollInterval time.Duration
	// FailingPollInterval is the same while something is wrong; default 10 s.
	FailingPollInterval time.Duration
	// SealUnreachableFor is how long after the last good contact Status goes on naming the key ID, beside saying what is wrong, while the KMS
	// cannot be reached: an API server writes under the seed it has for as long, and reads. Then, and at once when the KMS denies access or
	// the key may not be used, Status is an error; an API server stops writing three minutes later.
	SealUnreachableFor time.Duration
	// DrainTimeout is how long calls under way may take once the server is told to end; default [DefaultDrainTimeout].
	DrainTimeout time.Duration
	// Logger is told of what changes, and of calls that fail. The default discards.
	Logger *slog.Logger
	// Observer is told of each call that was answered ("Encrypt", "Decrypt" or "Status"), on its goroutine; it must not block. May be nil.
	Observer func(op string, code codes.Code)
}

// Server serves one KMS as a Kubernetes KMS v2 plugin.
//
// Encrypt and Decrypt are passed on. Status is answered from what is known: the server itself asks the KMS now and then, so that no number of
// clients and health checks costs KMS calls. The key ID that Status names is the one that Encrypt would answer: where the two differ, which
// an API server takes for a fault, Encrypt's counts.
//
// Errors are gRPC statuses by their class (Unavailable, PermissionDenied, FailedPrecondition, NotFound for a key that is gone, InvalidArgument,
// Internal) whose texts hold nothing secret. There is no authentication: who can connect may wrap and unwrap.
type Server struct {
	kmsapi.UnimplementedKeyManagementServiceServer
	cfg ServerConfig

	mu        sync.Mutex // guards what follows
	known     known
	contacted chan struct{} // closed after the first contact
	lastLog   time.Time     // of a failed call
	notLogged int           // failed calls since then

	poked  chan struct{} // asks for a contact ahead of time
	verify verification  // only the polling goroutine touches it
}

// NewServer makes a server. It calls nothing and starts nothing.
func NewServer(cfg ServerConfig) (*Server, error) {
	if cfg.Provider == "" || cfg.KMS == nil {
		return nil, errors.New("a plugin server needs a provider's name and a KMS client")
	}
	if cfg.PollInterval < 0 || cfg.FailingPollInterval < 0 || cfg.SealUnreachableFor < 0 || cfg.DrainTimeout < 0 {
		return nil, fmt.Errorf("plugin server of %q: durations must not be negative", cfg.Provider)
	}
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{{&cfg.PollInterval, time.Minute}, {&cfg.FailingPollInterval, 10 * time.Second}, {&cfg.DrainTimeout, DefaultDrainTimeout}} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Observer == nil {
		cfg.Observer = func(string, codes.Code) {}
	}
	return &Server{cfg: cfg, contacted: make(chan struct{}), poked: make(chan struct{}, 1)}, nil
}

// Serve answers on l, which it closes, until ctx ends; then calls under way are finished, or cut after DrainTimeout, and it returns nil.
// Nothing of the server runs any more once it has returned. It may be called once.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	// WaitForHandlers: what is cut off has ended, too, before this returns.
	server := grpc.NewServer(grpc.UnaryInterceptor(s.intercept), grpc.WaitForHandlers(true), grpc.ConnectionTimeout(10*time.Second))
	kmsapi.RegisterKeyManagementServiceServer(server, s)

	// The contacts go on while calls are finished: those of Status may wait for the first one.
	polling, end := context.WithCancel(context.WithoutCancel(ctx))
	var rest sync.WaitGroup
	defer rest.Wait()
	defer end()
	rest.Go(func() { s.poll(polling) })

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

// Status implements the KMS v2 API. It waits for the first contact with the KMS, and for nothing after that.
func (s *Server) Status(ctx context.Context, _ *kmsapi.StatusRequest) (*kmsapi.StatusResponse, error) {
	select {
	case <-s.contacted:
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	k := s.look()
	switch {
	case k.err == nil:
		return &kmsapi.StatusResponse{Version: "v2", Healthz: "ok", KeyId: k.keyID}, nil
	case kmsclient.ClassOf(k.err) == kmsclient.ClassUnavailable && k.keyID != "" && time.Since(k.lastGood) < s.cfg.SealUnreachableFor:
		return &kmsapi.StatusResponse{Version: "v2", Healthz: text(k.err), KeyId: k.keyID}, nil
	}
	return nil, statusOf(context.WithoutCancel(ctx), k.err)
}

// Encrypt implements the KMS v2 API. Where the KMS names its requests, an annotation of the answer does, too.
func (s *Server) Encrypt(ctx context.Context, req *kmsapi.EncryptRequest) (*kmsapi.EncryptResponse, error) {
	changes := s.look().changes
	noting, requestID := kmsclient.WithRequestID(ctx)
	res, err := s.cfg.KMS.Encrypt(noting, req.GetUid(), req.GetPlaintext())
	if err != nil {
		s.encrypted(changes, "", err)
		return nil, statusOf(ctx, err)
	}
	s.encrypted(changes, res.KeyID, nil)
	return &kmsapi.EncryptResponse{Ciphertext: res.Ciphertext, KeyId: res.KeyID, Annotations: annotated(res.Annotations, requestID())}, nil
}

// Decrypt implements the KMS v2 API. It takes what Encrypt answered here, what the proxy wrapped by the same KMS, and what the KMS itself did.
func (s *Server) Decrypt(ctx context.Context, req *kmsapi.DecryptRequest) (*kmsapi.DecryptResponse, error) {
	data, err := s.cfg.KMS.Decrypt(ctx, req.GetUid(), &service.DecryptRequest{
		Ciphertext: req.GetCiphertext(), KeyID: req.GetKeyId(), Annotations: bare(req.GetAnnotations()),
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
		if recover() != nil { // what was thrown may hold a secret
			res, err = nil, status.Error(codes.Internal, prefix+"a defect of the plugin server; see the metrics and the log")
		}
		code := status.Code(err)
		s.cfg.Observer(op, code)
		if err != nil && op != "Status" { // that of Status is in the log already
			s.failed(op, req, err)
		}
	}()
	return handler(ctx, req)
}

// failed logs at most once a second, or an API server that starts while its key is disabled would fill the log.
func (s *Server) failed(op string, req any, err error) {
	uid := ""
	if r, ok := req.(interface{ GetUid() string }); ok {
		uid = r.GetUid()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := time.Now(); now.Sub(s.lastLog) < time.Second {
		s.notLogged++
	} else {
		s.cfg.Logger.Warn("call failed", "provider", s.cfg.Provider, "operation", op, "uid", uid[:min(len(uid), 64)],
			"code", status.Code(err).String(), "reason", status.Convert(err).Message(), "notLoggedBefore", s.notLogged)
		s.lastLog, s.notLogged = now, 0
	}
}

// prefix says in an API server's log who speaks.
const prefix = "etcd-kms-proxy: "

// text is what clients may read of an error: a [*kmsclient.Error] holds nothing secret.
func text(err error) string {
	if e, ok := errors.AsType[*kmsclient.Error](err); ok {
		return prefix + e.Error()
	}
	return prefix + "the KMS call failed"
}

// statusOf gives an error the code of its class, which class turns back. A call that ended with its own context is told just that.
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
		code = codes.NotFound // for which a proxy turns to recovery copies, as it does not for a key that somebody has disabled
	case kmsclient.Invalid:
		code = codes.InvalidArgument
	case kmsclient.BrokenContract:
		code = codes.Internal
	}
	return status.Error(code, text(err))
}
