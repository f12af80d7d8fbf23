package bootstrap

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	plugin "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

// kubelet takes registrations, as the real one does.
type kubelet struct {
	plugin.UnimplementedRegistrationServer
	registered chan *plugin.RegisterRequest
}

func (k *kubelet) Register(_ context.Context, request *plugin.RegisterRequest) (*plugin.Empty, error) {
	k.registered <- request
	return &plugin.Empty{}, nil
}

func (k *kubelet) next(t *testing.T) *plugin.RegisterRequest {
	t.Helper()
	select {
	case request := <-k.registered:
		return request
	case <-time.After(20 * time.Second):
		t.Fatal("no plugin registers")
		return nil
	}
}

func TestDevicesAreRegisteredListedAllocatedAndRegisteredAgain(t *testing.T) {
	// A socket's path must be short.
	folder, err := os.MkdirTemp("", "dp")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(folder)
	listener, err := net.Listen("unix", filepath.Join(folder, filepath.Base(plugin.KubeletSocket)))
	if err != nil {
		t.Fatal(err)
	}
	k := &kubelet{registered: make(chan *plugin.RegisterRequest, 2)}
	server := grpc.NewServer()
	plugin.RegisterRegistrationServer(server, k)
	go server.Serve(listener)
	defer server.Stop()
	// It serves until the process ends.
	go ServeDevices([]string{"--resource", "nvidia.com/gpu", "--count", "3", "--folder", folder})

	request := k.next(t)
	if request.ResourceName != "nvidia.com/gpu" || request.Version != plugin.Version {
		t.Fatal(request)
	}
	socket := filepath.Join(folder, request.Endpoint)
	connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	client := plugin.NewDevicePluginClient(connection)
	stream, err := client.ListAndWatch(ctx, &plugin.Empty{})
	if err != nil {
		t.Fatal(err)
	}
	list, err := stream.Recv()
	if err != nil || len(list.Devices) != 3 || list.Devices[2].ID != "GPU-2" || list.Devices[2].Health != plugin.Healthy {
		t.Fatal(list, err)
	}
	allocated, err := client.Allocate(ctx, &plugin.AllocateRequest{
		ContainerRequests: []*plugin.ContainerAllocateRequest{{DevicesIds: []string{"GPU-0", "GPU-2"}}},
	})
	if err != nil || allocated.ContainerResponses[0].Envs["NVIDIA_VISIBLE_DEVICES"] != "GPU-0,GPU-2" {
		t.Error(allocated, err)
	}

	// A kubelet that starts anew removes the sockets of all plugins.
	if err := os.Remove(socket); err != nil {
		t.Fatal(err)
	}
	if again := k.next(t); again.ResourceName != "nvidia.com/gpu" {
		t.Error(again)
	}
}
